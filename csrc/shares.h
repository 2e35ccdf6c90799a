// Work that is shared out among threads in pieces: each takes its own in order, then what others have left, so that one
// whose core has other things to do does not hold up the rest.

#ifndef SECATEUR_SHARES_H
#define SECATEUR_SHARES_H

#include <algorithm>
#include <atomic>
#include <memory>

#include "secateur.h"

namespace sct {

class Shares {
  public:
    static constexpr int64_t PIECES = 8;  // of each thread

    // Before threads begin. Not while they take.
    void reset(int threads, int64_t count, int64_t unit) {
        if (threads != threads_) taken_.reset(new Counter[threads]);
        threads_ = threads, count_ = count, unit_ = unit;
        pieces_ = std::min((count + unit - 1) / unit, PIECES * threads);
        for (int thread = 0; thread < threads; thread++) taken_[thread].value.store(0, std::memory_order_relaxed);
    }

    // The next piece, whole units of [0, count); false when nothing is left.
    bool take(int thread, int64_t &begin, int64_t &end) {
        for (int other = 0; other < threads_; other++) {
            const int owner = (thread + other) % threads_;
            const int64_t first = pieces_ * owner / threads_, last = pieces_ * (owner + 1) / threads_;
            Counter &taken = taken_[owner];
            if (first + taken.value.load(std::memory_order_relaxed) >= last) continue;
            const int64_t piece = first + taken.value.fetch_add(1, std::memory_order_relaxed);
            if (piece >= last) continue;
            const int64_t units = (count_ + unit_ - 1) / unit_;
            begin = units * piece / pieces_ * unit_;
            end = std::min(count_, units * (piece + 1) / pieces_ * unit_);
            return true;
        }
        return false;
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    std::unique_ptr<Counter[]> taken_;
    int threads_ = 0;
    int64_t count_ = 0, unit_ = 1, pieces_ = 0;
};

}  // namespace sct

#endif
