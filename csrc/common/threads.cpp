#include "common/threads.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <link.h>
#endif

namespace foreshock {
namespace {

struct OpenMp {
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*max_threads)() = nullptr;
    int (*in_parallel)() = nullptr;

    explicit OpenMp(void* library) {
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
        max_threads =
            reinterpret_cast<decltype(max_threads)>(dlsym(library, "omp_get_max_threads"));
        in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(library, "omp_in_parallel"));
    }
    bool is_complete() const { return parallel && max_threads && in_parallel; }
};

#if defined(__linux__)
// Wheels rename the runtime they bundle (libgomp-a34b3233.so.1), so it is found by what is loaded.
int find_runtime(dl_phdr_info* info, std::size_t, void* found) {
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash ? slash + 1 : info->dlpi_name;
    for (const char* prefix : {"libgomp", "libomp", "libiomp5"}) {
        if (std::strncmp(name, prefix, std::strlen(prefix)) != 0) continue;
        *static_cast<void**>(found) = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
        return 1;
    }
    return 0;
}
#endif

const OpenMp& open_mp() {
    static const OpenMp runtime = [] {
        OpenMp global(RTLD_DEFAULT);
        if (global.is_complete()) return global;
        void* loaded = nullptr;
#if defined(__linux__)
        dl_iterate_phdr(find_runtime, &loaded);
#endif
        return loaded ? OpenMp(loaded) : global;
    }();
    return runtime;
}

struct Work {
    std::atomic<std::int64_t> next{0};
    std::int64_t count;
    void (*task)(void*, std::int64_t);
    void* context;
};

void take_tasks(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (;;) {
        const std::int64_t index = work.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= work.count) return;
        work.task(work.context, index);
    }
}

}  // namespace

int thread_count() {
    const OpenMp& runtime = open_mp();
    if (!runtime.is_complete() || runtime.in_parallel()) return 1;
    return runtime.max_threads();
}

void run_tasks(std::int64_t count, void (*task)(void*, std::int64_t), void* context) {
    const int threads = count > 1 ? thread_count() : 1;
    if (threads <= 1) {
        for (std::int64_t index = 0; index < count; ++index) task(context, index);
        return;
    }
    Work work;
    work.count = count;
    work.task = task;
    work.context = context;
    open_mp().parallel(take_tasks, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace foreshock
