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

// The same for instructions that take both bytes of a mask, or eight floats, at once: 32 bytes for each byte of a mask.
struct alignas(32) PairOrder {
    uint8_t first[16];   // where this byte comes first: its order, then 8 times how many it takes
    uint8_t second[16];  // where it comes second: 8 zeros, then its order; the sum of both is the order of 16 columns
};

struct PairOrders {
    PairOrder of[256];
};

constexpr PairOrders make_pair_orders() {
    PairOrders orders = {};
    for (int mask = 0; mask < 256; ++mask) {
        for (int column = 0; column < 8; ++column) {
            uint8_t from = kShuffles.bytes[mask][column];
            orders.of[mask].first[column] = orders.of[mask].second[8 + column] = from;
            orders.of[mask].first[8 + column] = kShuffles.counts[mask];
        }
    }
    return orders;
}

static constexpr PairOrders kPairOrders = make_pair_orders();

// Elements of two bytes to the upper halves of 8 lanes of four bytes: what bf16 is in a float.
struct UpperOrders {
    alignas(32) uint8_t of[256][32];
};

constexpr UpperOrders make_upper_orders() {
    UpperOrders orders = {};
    for (int mask = 0; mask < 256; ++mask) {
        for (int i = 0; i < 32; ++i) {
            orders.of[mask][i] = i % 4 < 2 ? kNone : kShuffles.pairs[mask][i / 4 * 2 + i % 2];
        }
    }
    return orders;
}

static constexpr UpperOrders kUpperOrders = make_upper_orders();

}  // namespace sct

#endif
