// A pool of threads for work of microseconds. A thread that has nothing to do spins for a while, because the next piece
// usually follows at once, then sleeps. After a fork only the forking thread lives on in the child, so a crew belongs to
// a process, and the first run in another one hires a new crew; the old one's memory is left alone there.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _WIN32
#include <process.h>
#define SCT_GETPID _getpid
#else
#include <unistd.h>
#define SCT_GETPID getpid
#endif

#include "secateur.h"

namespace {

constexpr std::chrono::microseconds kSpin{100};

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#endif
}

// Spins until ready() or the time is up; returns whether it was ready.
template <class Ready>
bool spin_until(Ready ready) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

class Crew {
  public:
    Crew(int threads, long process) : process(process) {
        try {
            workers_.reserve(static_cast<size_t>(threads));
            for (int i = 1; i < threads; ++i) {
                workers_.emplace_back([this, i] { work(i); });
                ++threads_;
            }
        } catch (const std::exception &) {
            // No more threads to be had: the work is split among those that started.
        }
    }

    ~Crew() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (std::thread &worker : workers_) worker.join();
    }

    void run(void (*task)(void *, int, int), void *argument) {
        std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
        task_ = task;
        argument_ = argument;
        remaining_.store(threads_ - 1, std::memory_order_relaxed);
        if (threads_ > 1) {
            generation_.fetch_add(1);
            if (sleepers_.load() > 0) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                wake_.notify_all();
            }
        }
        task(argument, 0, threads_);
        auto done = [this] { return remaining_.load(std::memory_order_acquire) == 0; };
        if (done() || spin_until(done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        caller_sleeps_.store(true);
        done_.wait(lock, [this] { return remaining_.load() == 0; });
        caller_sleeps_.store(false);
    }

    const long process;

  private:
    void work(int index) {
        unsigned seen = 0;
        for (;;) {
            auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
            if (!called() && !spin_until(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                sleepers_.fetch_sub(1);
            }
            if (stop_) return;
            ++seen;
            task_(argument_, index, threads_);
            if (remaining_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                done_.notify_one();
            }
        }
    }

    // Written between runs by the caller, read by workers after they see the next generation.
    void (*task_)(void *, int, int) = nullptr;
    void *argument_ = nullptr;
    std::atomic<int> threads_{1};
    bool stop_ = false;
    std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<int> remaining_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};
    std::mutex run_mutex_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
};

}  // namespace

struct sct_pool {
    int threads;
    std::atomic<Crew *> crew;
};

namespace {

Crew *crew_of(sct_pool *pool) {
    long process = static_cast<long>(SCT_GETPID());
    Crew *crew = pool->crew.load(std::memory_order_acquire);
    while (!crew || crew->process != process) {
        Crew *fresh = new (std::nothrow) Crew(pool->threads, process);
        if (!fresh || pool->crew.compare_exchange_strong(crew, fresh)) return fresh;
        delete fresh;  // another thread of this process was sooner
    }
    return crew;
}

}  // namespace

extern "C" sct_pool *sct_pool_create(int threads) {
    sct_pool *pool = new (std::nothrow) sct_pool;
    if (!pool) return nullptr;
    pool->threads = threads < 1 ? 1 : threads;
    pool->crew.store(nullptr);
    return pool;
}

extern "C" void sct_pool_destroy(sct_pool *pool) {
    if (!pool) return;
    Crew *crew = pool->crew.load();
    if (crew && crew->process == static_cast<long>(SCT_GETPID())) delete crew;
    delete pool;
}

extern "C" int sct_pool_threads(const sct_pool *pool) { return pool ? pool->threads : 1; }

extern "C" void sct_pool_run(sct_pool *pool, void (*task)(void *argument, int thread, int threads), void *argument) {
    Crew *crew = pool && pool->threads > 1 ? crew_of(pool) : nullptr;
    if (crew) {
        crew->run(task, argument);
    } else {
        task(argument, 0, 1);
    }
}
