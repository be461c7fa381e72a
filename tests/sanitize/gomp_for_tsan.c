// Tells ThreadSanitizer what OpenMP orders: libgomp is not instrumented, so that TSan would take its parallel regions for
// threads that never wait for each other. Preloaded by tests/sanitize/run.
#define _GNU_SOURCE
#include <dlfcn.h>

void __tsan_acquire(void*);
void __tsan_release(void*);

typedef void (*Body)(void*);
typedef void (*Parallel)(Body, void*, unsigned, unsigned);

struct Region {
  Body body;
  void* argument;
};

static void run(void* region_) {
  struct Region* const region = region_;
  __tsan_acquire(region);
  region->body(region->argument);
  __tsan_release(region);
}

void GOMP_parallel(Body body, void* argument, unsigned threads, unsigned flags) {
  static Parallel libgomps;
  if (libgomps == 0) libgomps = (Parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
  struct Region region = {body, argument};
  __tsan_release(&region);
  libgomps(run, &region, threads, flags);
  __tsan_acquire(&region);
}
