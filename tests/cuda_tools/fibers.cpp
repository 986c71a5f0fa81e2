// The emulated threads: fibers, and a scheduler that lets warps run as far ahead of each other as barriers permit.
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "emulated.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { nothing, shuffle, barrier, forever };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Wait wait;
    unsigned partner;
    uint64_t value;  // offered, then received
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
void (*body)(const void*);
const void* body_argument;
std::string fault;
unsigned order;

void switch_to(ucontext_t& from, ucontext_t& to) {
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, to.uc_stack.ss_sp, to.uc_stack.ss_size);
#endif
    swapcontext(&from, &to);
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (&from == &scheduler) return;
    scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
    scheduler.uc_stack.ss_size = size;
#endif
}

void yield(Wait wait) {
    fibers[current].wait = wait;
    switch_to(fibers[current].context, scheduler);
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    scheduler.uc_stack.ss_sp = const_cast<void*>(bottom);
    scheduler.uc_stack.ss_size = size;
#endif
    body(body_argument);
    yield(Wait::forever);
}

void start(unsigned thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::nothing;
    makecontext(&fiber.context, thread_main, 0);
}

std::vector<unsigned> ordered(unsigned count) {
    std::vector<unsigned> places(count);
    for (unsigned at = 0; at < count; ++at) places[at] = order == 1 ? count - 1 - at : at;
    unsigned random = order;
    for (unsigned at = count; order > 1 && at > 1; --at) {
        random = random * 1664525u + 1013904223u;
        std::swap(places[at - 1], places[(random >> 8) % at]);
    }
    return places;
}

// Whether all lanes wait in one and the same shuffle; they then have their partners' values.
bool exchange(unsigned first_thread) {
    Fiber* const lanes = &fibers[first_thread];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (lanes[lane].wait != Wait::shuffle || lanes[lane].partner != lanes[0].partner) return false;
    }
    uint64_t offered[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) offered[lane] = lanes[lane].value;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        lanes[lane].value = offered[lane ^ lanes[lane].partner];
        lanes[lane].wait = Wait::nothing;
    }
    return true;
}

// Runs a warp until it waits for other warps; whether it ran at all.
bool run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
    bool ran = false;
    do {
        for (const unsigned lane : lanes) {
            current = warp * kWarp + lane;
            if (fibers[current].wait != Wait::nothing) continue;
            threadIdx = dim3(current, 0, 0);
            switch_to(scheduler, fibers[current].context);
            ran = true;
        }
    } while (exchange(warp * kWarp));
    return ran;
}

void run_block(unsigned threads) {
    const auto warps = ordered(threads / kWarp), lanes = ordered(kWarp);
    for (unsigned thread = 0; thread < threads; ++thread) start(thread);
    const auto all = [&](auto holds) { return std::all_of(fibers.begin(), fibers.begin() + threads, holds); };
    while (!all([](const Fiber& fiber) { return fiber.wait == Wait::forever; })) {
        bool ran = false;
        for (const unsigned warp : warps) ran |= run_warp(warp, lanes);
        if (all([](const Fiber& fiber) { return fiber.wait == Wait::barrier || fiber.wait == Wait::forever; })) {
            for (unsigned thread = 0; thread < threads; ++thread) {
                if (fibers[thread].wait == Wait::barrier) fibers[thread].wait = Wait::nothing;
            }
        } else if (!ran) {
            return report("a barrier or a shuffle is not reached by all of its threads");
        }
    }
}

}  // namespace

void run_grid(dim3 grid, unsigned threads, void (*call)(const void*), const void* kernel) {
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    body = call;
    body_argument = kernel;
    gridDim = grid;
    blockDim = dim3(threads);
    const auto columns = ordered(grid.x), rows = ordered(grid.y);
    for (const unsigned y : rows) {
        for (const unsigned x : columns) {
            if (!fault.empty()) return;
            blockIdx = dim3(x, y, 0);
            run_block(threads);
        }
    }
}

void barrier() { yield(Wait::barrier); }

uint64_t exchanged(uint64_t value, unsigned partner) {
    const unsigned self = current;
    fibers[self].partner = partner;
    fibers[self].value = value;
    yield(Wait::shuffle);
    return fibers[self].value;
}

void report(const char* what) {
    if (fault.empty()) fault = what;
}

bool has_fault() { return !fault.empty(); }

const char* taken_fault() {
    static std::string taken;
    if (fault.empty()) return nullptr;
    taken.swap(fault);
    fault.clear();
    fibers.clear();  // threads may hang in the middle of things
    return taken.c_str();
}

void set_order(unsigned wanted) { order = wanted; }

}  // namespace emulated

// --- what -fsanitize=undefined calls, misaligned vectors above all: reported, rather than printed ------------

#ifndef __SANITIZE_ADDRESS__
namespace {

struct Place {
    const char* file;
    uint32_t line, column;
};

void undefined(const char* what, const void* data) {
    const Place& place = *static_cast<const Place*>(data);
    emulated::report((std::string(what) + " at " + place.file + ":" + std::to_string(place.line)).c_str());
}

}  // namespace

#define UNDEFINED(what) \
    extern "C" void __ubsan_handle_##what(const void* data) { undefined(#what, data); }
UNDEFINED(type_mismatch_v1)
UNDEFINED(pointer_overflow)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(out_of_bounds)
UNDEFINED(load_invalid_value)
UNDEFINED(builtin_unreachable)
UNDEFINED(missing_return)
UNDEFINED(vla_bound_not_positive)
UNDEFINED(float_cast_overflow)
UNDEFINED(invalid_builtin)
UNDEFINED(nonnull_arg)
#endif
