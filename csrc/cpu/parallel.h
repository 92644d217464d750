// Runs tasks on torch's own threads.
#pragma once

#include <cstdint>

namespace dami {

void parallel(int64_t tasks, int threads, void (*run)(void* data, int64_t task, int worker), void* data);

// Calls body(task, worker) once for every task in [0, tasks), worker in [0, threads). Each worker has a share of tasks that
// follow each other, and then takes those of others, one at a time: a thread the system slows down does fewer. What is
// computed must not depend on which worker does it.
template <class Body>
void parallel_for(int64_t tasks, int threads, Body body) {
  parallel(
      tasks, threads, [](void* data, int64_t task, int worker) { (*static_cast<Body*>(data))(task, worker); }, &body);
}

}  // namespace dami
