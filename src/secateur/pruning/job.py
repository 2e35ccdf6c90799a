"""One derivation, from an open workspace to a published folder: forecast, embed, prune the blocks, finish."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from secateur.calibration.packing import CalibrationSet
from secateur.checkpoint.format import ACTIVATIONS, LOG, MANIFEST, dump_json, shard_name
from secateur.checkpoint.shards import write_outer_shard
from secateur.checkpoint.submodel import Provenance, finish_submodel
from secateur.config import Recipe
from secateur.errors import ModelError
from secateur.files import atomic_write_bytes, peak_memory
from secateur.models.replay import record_inputs
from secateur.models.source import ModelFolder
from secateur.models.structure import Block
from secateur.models.weights import WeightReader, drop_parameters, set_parameters
from secateur.pruning.budgets import BUDGETS
from secateur.pruning.forecast import TOKENS_PER_BATCH, Forecast, make_forecast
from secateur.pruning.loop import Activations, BlockRun, Progress, prune_blocks
from secateur.pruning.methods import METHODS
from secateur.pruning.workspace import Workspace

VALUE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Job:
    """One derivation into an open workspace.

    Attributes
    ----------
    folder
        The base model.
    model
        Its skeleton, parameters on the meta device.
    plan
        Everything that decides the bytes of the result, as plain JSON.
    """

    folder: ModelFolder
    model: PreTrainedModel
    blocks: tuple[Block, ...]
    recipe: Recipe
    calibration: CalibrationSet
    device: torch.device
    workspace: Workspace
    plan: dict[str, Any]

    def run(self, progress: Progress, announce: Callable[[str], None] | None) -> dict[str, Any]:
        """Do the work, publish the folder and return the log."""
        started, timings = time.perf_counter(), dict[str, float]()
        memory_before = psutil.Process().memory_info().rss
        sizes = {b.weight_name(n): self._shape(b, n)[0] * self._shape(b, n)[1] for b in self.blocks for n in b.prunable}
        reader = WeightReader(self.folder, self.model)
        needs_data = METHODS.get(self.recipe.method).needs != "nothing"
        dtype = self._dtype(reader)
        batch_size = max(1, TOKENS_PER_BATCH // self.recipe.sequence_length)
        forecast = make_forecast(
            self.model,
            self.blocks,
            self.calibration.token_ids.size if needs_data else 0,
            dtype.itemsize,
            batch_size * self.recipe.sequence_length,
            self.workspace.folder,
        )
        if announce is not None:
            announce(forecast.describe())
        self._check_weights(reader)
        activations = self._embed(reader, forecast, dtype, batch_size, timings) if needs_data else None
        block_run = BlockRun(
            self.model,
            self.blocks,
            reader,
            self.recipe,
            BUDGETS.get(self.recipe.budget).function(sizes, self.recipe.sparsity),
            lambda block: self.workspace.folder / shard_name(block.index + 1, len(self.blocks) + 1),
            activations,
            self.device,
        )
        prune_blocks(block_run, progress, timings)
        finish_started = time.perf_counter()
        manifest = self._finish(reader, dtype)
        timings["finish"] = time.perf_counter() - finish_started
        log = self._log(time.perf_counter() - started, timings, memory_before)
        atomic_write_bytes(self.workspace.folder / LOG, dump_json(log))
        atomic_write_bytes(self.workspace.folder / MANIFEST, dump_json(manifest))
        self.workspace.publish()
        return log

    def _stored_names(self) -> list[str]:
        """Return the names of all parameters but those that are tied to another one."""
        tied = set(self.model.all_tied_weights_keys) if self.model.config.tie_word_embeddings else set()
        return [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in tied]

    def _check_weights(self, reader: WeightReader) -> None:
        """Raise `ModelError` for a weight that is missing, misshapen or not finite before hours of work, not after."""
        for name in self._stored_names():
            with reader:  # opened anew for each weight, so that no more than that is mapped
                received, expected = list(reader.checked(name).shape), list(self.model.get_parameter(name).shape)
            if received != expected:
                raise ModelError(
                    f"weight {name!r} of model {self.folder.name!r} has shape {received}, its config asks for "
                    f"{expected}; fetch the model again"
                )

    def _shape(self, block: Block, linear: str) -> tuple[int, int]:
        out_features, in_features = self.model.get_submodule(f"{block.name}.{linear}").weight.shape
        return out_features, in_features

    def _dtype(self, reader: WeightReader) -> torch.dtype:
        with reader:
            return reader.mapped(self.blocks[0].weight_name(self.blocks[0].prunable[0])).dtype

    def _embed(
        self, reader: WeightReader, forecast: Forecast, dtype: torch.dtype, batch_size: int, timings: dict[str, float]
    ) -> Activations:
        """Run everything before the first block over the calibration set and record what each block receives."""
        started = time.perf_counter()
        config = self.model.config.get_text_config(decoder=True)
        shape = (*self.calibration.token_ids.shape, config.hidden_size)
        if forecast.map_activations:
            hidden_states = torch.from_file(
                str(self.workspace.folder / ACTIVATIONS), shared=True, size=shape[0] * shape[1] * shape[2], dtype=dtype
            ).view(shape)
        else:
            hidden_states = torch.empty(shape, dtype=dtype)
        decoder = self.model.get_decoder()
        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        inside = tuple(f"{block.name}." for block in self.blocks)
        with reader, torch.inference_mode():
            outer = [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]
            outer = [name for name in outer if name.startswith(f"{prefix}.")]
            set_parameters(self.model, {name: reader.mapped(name).to(self.device, dtype) for name in outer})
            inputs = record_inputs(
                self.model,
                self.blocks,
                torch.from_numpy(self.calibration.token_ids),
                batch_size,
                lambda start, hidden: hidden_states[start : start + len(hidden)].copy_(hidden),
                self.device,
            )
            for name in outer:
                drop_parameters(self.model.get_submodule(name.rpartition(".")[0]))
        timings["embed"] = time.perf_counter() - started
        return Activations(hidden_states, inputs, batch_size)

    def _finish(self, reader: WeightReader, dtype: torch.dtype) -> dict[str, Any]:
        total = len(self.blocks) + 1
        inside = tuple(f"{block.name}." for block in self.blocks)
        outer = [name for name in self._stored_names() if not name.startswith(inside)]
        path = self.workspace.folder / shard_name(total, total)
        if not path.exists():
            with reader:
                write_outer_shard(path, {n: (reader.shape(n), reader.mapped(n).dtype) for n in outer}, reader.mapped)
        shapes = {b.weight_name(n): self._shape(b, n) for b in self.blocks for n in b.prunable}
        provenance = Provenance(
            self.plan["base_model"],
            self.plan["recipe"],
            self.plan["calibration"],
            self.plan["versions"],
            VALUE_NAMES[dtype],
        )
        shards = [shard_name(number, total) for number in range(1, total + 1)]
        return finish_submodel(self.workspace.folder, self.folder.path, shards, shapes, provenance)

    def _log(self, seconds: float, timings: dict[str, float], memory_before: int) -> dict[str, Any]:
        peak = peak_memory()
        return {
            "seconds": round(seconds, 3),
            "seconds_by_stage": {stage: round(value, 3) for stage, value in timings.items()},
            "peak_memory_bytes": peak,
            "peak_memory_above_start_bytes": max(0, peak - memory_before),
            "threads": torch.get_num_threads(),
            "resumed": self.workspace.resumed,
            "machine": platform.platform(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
