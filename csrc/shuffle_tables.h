// For each byte of a bitmask, which packed element goes to each of its 8 columns; kNone, which byte shuffles of x86 and
// of ARM turn into zero, where nothing was kept.

#ifndef SECATEUR_SHUFFLE_TABLES_H
#define SECATEUR_SHUFFLE_TABLES_H

#include <stdint.h>

namespace sct {

constexpr uint8_t kNone = 0x80;

struct ShuffleTables {
    alignas(64) uint8_t bytes[256][8];   // of elements of one byte
    alignas(64) uint8_t pairs[256][16];  // of elements of two bytes
    alignas(64) uint8_t shifts[9][16];   // 8 zeros, then 8 times what the first byte of two has taken
    uint8_t counts[256];                 // columns that are kept
};

constexpr ShuffleTables make_shuffle_tables() {
    ShuffleTables tables = {};
    for (int mask = 0; mask < 256; ++mask) {
        uint8_t taken = 0;
        for (int column = 0; column < 8; ++column) {
            bool kept = (mask >> column) & 1;
            tables.bytes[mask][column] = kept ? taken : kNone;
            tables.pairs[mask][2 * column] = kept ? static_cast<uint8_t>(2 * taken) : kNone;
            tables.pairs[mask][2 * column + 1] = kept ? static_cast<uint8_t>(2 * taken + 1) : kNone;
            taken = static_cast<uint8_t>(taken + kept);
        }
        tables.counts[mask] = taken;
    }
    for (int count = 0; count < 9; ++count) {
        for (int i = 8; i < 16; ++i) tables.shifts[count][i] = static_cast<uint8_t>(count);
    }
    return tables;
}

static constexpr ShuffleTables kShuffles = make_shuffle_tables();

}  // namespace sct

#endif
