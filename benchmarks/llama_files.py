"""Files of llama.cpp for a parent: its types, with an importance matrix from the calibration text of a domain."""

import ctypes

import gguf
import torch
from transformers import AutoModelForCausalLM
from watching import summed_inputs

import secateur
from secateur.checkpoint.format import read_json
from secateur.files import atomic_file
from secateur.models.gguf_names import tensor_sources
from secateur.models.gguf_vocabulary import vocabulary_metadata
from secateur.models.gguf_writer import LazyBlocks, write_gguf
from secateur.models.products import fast_products
from secateur.models.source import load_tokenizer
from secateur.models.structure import find_blocks

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def importance_matrix(folder, domain, samples, data):
    """Return {GGUF tensor name: mean squares of the inputs, float32 [in_features]} of the weights inside the blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer(folder)
    token_ids = torch.from_numpy(secateur.calibrate(domain, tokenizer, samples=samples, data=data).token_ids)
    names = [f"{block.name}.{linear}" for block in find_blocks(model) for linear in block.prunable]
    with fast_products():
        sums = summed_inputs(
            model, names, token_ids, lambda inputs: inputs.float().flatten(0, -2).square().sum(0).double()
        )
    means = {f"{name}.weight": (total / token_ids.numel()).float() for name, total in sums.items()}
    config = read_json(folder.path / "config.json")
    sources = tensor_sources(config["model_type"], config)
    return {source.name: means[name] for name, source in sources.items() if name in means}


def tied_file(parent, folder, target):
    """Return the parent's file, or a copy in which a head that is the embedding once more is stored once.

    Some files have both although the model ties them, in different types: the copy has the finer one. llama.cpp's files
    would be a fifth larger than they need be otherwise.
    """
    reader = gguf.GGUFReader(parent)
    tensors = {one.name: one for one in reader.tensors}
    if HEAD not in tensors or not read_json(folder.path / "config.json")["tie_word_embeddings"]:
        return parent
    if not target.exists():
        embedding = max((tensors[name] for name in (EMBEDDING, HEAD)), key=lambda one: one.n_bytes)
        content = {name: (one.data, one.tensor_type) for name, one in tensors.items() if name != HEAD}
        content[EMBEDDING] = (embedding.data, embedding.tensor_type)
        write_copy(reader, {}, content, target)
    return target


def smaller_file(tied, folder, smaller, target):
    """Return a copy of a file whose embedding is stored once, with the tokens of a smaller model of the same parent.

    Rows of the embedding are taken as they are, so nothing is quantised twice.
    """
    if not target.exists():
        reader = gguf.GGUFReader(tied)
        before, after = (load_tokenizer(one).get_vocab() for one in (folder, smaller))
        rows = [before[token] for token, _ in sorted(after.items(), key=lambda pair: pair[1])]
        config = read_json(smaller.path / "config.json")
        if len(rows) != config["vocab_size"]:
            raise SystemExit(f"{smaller.path} has rows for tokens without a name")
        content = {one.name: (one.data, one.tensor_type) for one in reader.tensors}
        if HEAD in content:
            raise SystemExit(f"{tied} has a head of its own")
        content[EMBEDDING] = (content[EMBEDDING][0][rows], content[EMBEDDING][1])
        metadata = vocabulary_metadata(smaller.path, config, config["model_type"])
        if (key := f"{config['model_type']}.vocab_size") in reader.fields:
            metadata[key] = len(rows)
        write_copy(reader, metadata, content, target)
    return target


def write_copy(reader, metadata, content, target):
    """Write the keys of a file, or what `metadata` has in their place, and tensors {name: (blocks, type)}."""
    architecture = reader.get_field("general.architecture").contents()
    gone = ("GGUF.", "general.architecture", *(["tokenizer."] if metadata else []))  # whose ids would be the old ones
    kept = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(gone)}
    shapes = {one.name: [int(length) for length in reversed(one.shape)] for one in reader.tensors}
    tensors = {
        name: LazyBlocks((len(data), *shapes[name][1:]), kind, lambda data=data: data)
        for name, (data, kind) in content.items()
    }
    with atomic_file(target) as partial:
        write_gguf(partial, architecture, kept | metadata, tensors)


def quantise(source, kind, matrix, target):
    """Let llama.cpp quantise a GGUF to `kind` with an importance matrix."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, None)
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one, empty, ends the list
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = ctypes.cast(values.contiguous().data_ptr(), ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    kind, _, embedding = kind.partition("/")
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if embedding:
        options.token_embedding_type = options.output_tensor_type = getattr(llama_cpp, f"GGML_TYPE_{embedding}")
    options.allow_requantize = True
    options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    with atomic_file(target) as partial:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), options) != 0:
            raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")
