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

// The runtime of the program, else of torch, else any that is loaded; nullptr without one.
const OpenMP* openmp();

}  // namespace lc
