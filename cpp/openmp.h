// openmp.h - the OpenMP runtime that another library or the program has loaded. leetcore links
// none.
#pragma once

namespace lc {

// Entry points of libgomp. The runtimes of LLVM and Intel have them too.
struct OpenMP {
  int (*in_parallel)();
  int (*max_threads)();
  int (*thread_num)();
  int (*num_threads)();
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
};

// The runtime of the program, else that of torch, else any that is loaded; nullptr if there is
// none. A forked child does not search, because a thread that is gone may hold a lock of the
// loader.
const OpenMP* openmp();

// Whether this process was forked and has not executed another program since. The threads of its
// OpenMP runtime are then gone, and a parallel region would wait for them forever.
bool forked();

}  // namespace lc
