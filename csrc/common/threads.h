#pragma once

#include <cstdint>

namespace foreshock {

// Runs task(context, i) for every i in [0, count), on as many threads as the caller's OpenMP
// setting allows (torch.set_num_threads sets it). The team is that of the OpenMP runtime which is
// already loaded in the process, torch's own: a second runtime would fight the first one's spinning
// workers for the cores. Without one, or with one thread, the tasks run here in order.
void run_tasks(std::int64_t count, void (*task)(void* context, std::int64_t index), void* context);

// How many threads run_tasks would use now.
int thread_count();

}  // namespace foreshock
