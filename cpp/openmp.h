// openmp.h - the OpenMP runtime that something else has brought into the process. leetcore links none.
#pragma once

namespace lc {

// Entry points of libgomp, which LLVM's and Intel's runtimes have too.
struct OpenMP {
  int (*in_parallel)();
  int (*max_threads)();
  int (*thread_num)();
  int (*num_threads)();
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
};

// The runtime of the program, else of torch, else any that is loaded; nullptr without one. A forked child looks for
// none, as a lock of the loader may be held by a thread that is gone.
const OpenMP* openmp();

// Whether this process has been forked and has not begun another program since. The threads of its OpenMP runtime are
// then gone, and its regions would wait for them for ever.
bool forked();

}  // namespace lc
