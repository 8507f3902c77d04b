// The part of GCC's OpenMP runtime that the CPU kernels use, written with C++ threads.
// ThreadSanitizer sees all locks here, while it knows nothing of those in libgomp.
//
// Each parallel region starts new threads, often fewer than it asks for, as OpenMP allows.
#include "openmp.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Barrier {
  std::mutex mutex;
  std::condition_variable all_came;
  int size, waiting = 0;
  long round = 0;

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      all_came.notify_all();
    } else {
      all_came.wait(lock, [&] { return round != mine; });
    }
  }
};

struct Team {
  int size;
  Barrier barrier;
  std::mutex mutex;
  long loops = 0;  // how many loops the member that is ahead has begun
  long next = 0, end = 0, step = 1, chunk = 1;
};

struct Member {
  Team* team = nullptr;
  int rank = 0;
  long loops = 0;
};

thread_local Member self;
unsigned regions = 0;

bool take(Team& team, long* begin, long* end) {
  if (team.next >= team.end) return false;
  *begin = team.next;
  *end = team.next = std::min(team.next + team.chunk * team.step, team.end);
  return true;
}

}  // namespace

int threads_given(int asked, unsigned region) {
  return region % 3 == 0 ? asked : 1 + static_cast<int>(region / 3 % asked);
}

extern "C" {

void GOMP_parallel(void (*work)(void*), void* data, unsigned asked, unsigned) {
  Team team{};
  team.size = team.barrier.size = threads_given(static_cast<int>(asked), regions++);
  const Member before = self;
  std::vector<std::thread> threads;
  for (int rank = 1; rank < team.size; ++rank)
    threads.emplace_back([&, rank] {
      self = {&team, rank, 0};
      work(data);
    });
  self = {&team, 0, 0};
  work(data);
  for (std::thread& thread : threads) thread.join();
  self = before;
}

void GOMP_barrier() {
  if (self.team) self.team->barrier.wait();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long* begin,
                                          long* end) {
  Team& team = *self.team;
  std::lock_guard<std::mutex> lock(team.mutex);
  if (team.loops == self.loops++) {
    ++team.loops;
    team.next = first;
    team.end = last;
    team.step = step;
    team.chunk = chunk;
  }
  return take(team, begin, end);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  std::lock_guard<std::mutex> lock(self.team->mutex);
  return take(*self.team, begin, end);
}

void GOMP_loop_end_nowait() {}

int omp_get_thread_num() { return self.rank; }
int omp_get_num_threads() { return self.team ? self.team->size : 1; }
}
