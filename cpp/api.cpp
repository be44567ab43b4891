// api.cpp - the C entry points: check, choose, run; exceptions become status codes here and nowhere else.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "cpu/isa.h"
#include "interrupt.h"
#include "methods.h"
#include "thread_count.h"
#include "tuning.h"
#ifdef LC_WITH_CUDA
#include "cuda/device.h"
#endif

namespace {

thread_local std::string last_error;

template <class F>
lc_status guarded(F&& f) {
  try {
    f();
    return LC_OK;
  } catch (const lc::Error& e) {
    last_error = e.what();
    return e.status;
  } catch (const std::bad_alloc&) {
    last_error = "leetcore could not allocate a few bytes of host memory";
    return LC_MEMORY;
  } catch (const std::exception& e) {
    last_error = std::string("internal error: ") + e.what();
    return LC_INTERNAL;
  }
}

// An older caller's struct is shorter: what it does not know reads as absent.
lc_args widen(const lc_args* a) {
  if (!a) lc::fail(LC_INVALID, "args: expected a pointer to lc_args, got NULL");
  lc_args full = {};
  std::memcpy(&full, a, std::min<size_t>(a->struct_size, sizeof full));
  return full;
}

}  // namespace

lc_status lc_run(const lc_args* args) {
  return guarded([&] {
    const lc_args a = widen(args);
    lc::Problem p = lc::check(a);
    const lc::Method& m = *lc::choose(p, a.method).method;
    const size_t needed = m.workspace(p);
    if (p.workspace_bytes < needed)
      lc::fail(LC_MEMORY, "workspace: method %s needs %zu bytes, got %zu", m.info.name, needed, p.workspace_bytes);
    const int alignment = p.device.type == LC_CUDA ? 256 : 64;
    if (needed && (!p.workspace || reinterpret_cast<uintptr_t>(p.workspace) % alignment))
      lc::fail(LC_MEMORY, "workspace: expected an address that is a multiple of %d, got %p", alignment, p.workspace);
#ifdef LC_WITH_CUDA
    if (p.device.type == LC_CUDA) {
      const lc::cuda::DeviceGuard guard(p.device.id);
      return m.run(p);
    }
#endif
    if (!a.interrupt) return m.run(p);
    lc::Interrupt interrupt(a.interrupt, a.interrupt_context);
    p.interrupt = &interrupt;
    m.run(p);
    if (interrupt.stopped())
      lc::fail(LC_INTERRUPTED, "interrupt: asked for the end of the call; the outputs are undefined");
  });
}

lc_status lc_workspace(const lc_args* args, size_t* bytes) {
  return guarded([&] {
    if (!bytes) lc::fail(LC_INVALID, "bytes: expected a pointer, got NULL");
    const lc_args a = widen(args);
    const lc::Problem p = lc::check_structure(a);
    *bytes = lc::choose(p, a.method).method->workspace(p);
  });
}

lc_status lc_predict(const lc_args* args, lc_cost* cost, size_t size) {
  return guarded([&] {
    if (!cost) lc::fail(LC_INVALID, "cost: expected a pointer, got NULL");
    const lc_args a = widen(args);
    const lc::Problem p = lc::check_structure(a);
    const lc::Choice chosen = lc::choose(p, a.method);
    const lc::Cost& c = chosen.cost;
    const lc_cost full = {chosen.method->info.name,    c.flop,  c.least_bytes, c.bytes,
                          chosen.method->workspace(p), c.depth, c.microseconds};
    std::memcpy(cost, &full, std::min(size, sizeof full));
  });
}

lc_status lc_explain(const lc_args* args, char* text, size_t size) {
  return guarded([&] {
    if (!text || !size) lc::fail(LC_INVALID, "text: expected a buffer of at least one byte, got none");
    const lc_args a = widen(args);
    const lc::Problem p = lc::check_structure(a);
    const lc::Choice chosen = lc::choose(p, a.method);
    std::string s;
    for (const lc::Method* m : lc::methods()) {
      char line[320];
      if (const char* why = lc::refusal(*m, p)) {
        std::snprintf(line, sizeof line, "  %-10s %-4s  cannot: %s\n", m->info.name, m->info.device, why);
      } else {
        const lc::Cost c = lc::predict(*m, p);
        char verdict[40] = "chosen";
        if (m != chosen.method)
          std::snprintf(verdict, sizeof verdict, "%.2f times the chosen", c.microseconds / chosen.cost.microseconds);
        else if (a.method && std::strcmp(a.method, "auto"))
          std::snprintf(verdict, sizeof verdict, "named");
        std::snprintf(
            line, sizeof line,
            "%c %-10s %-4s  %s: predicted %.1f us, %.4g Mflop, %.4g MB moved, workspace %zu bytes, depth %.0f\n",
            m == chosen.method ? '*' : ' ', m->info.name, m->info.device, verdict, c.microseconds, c.flop / 1e6,
            c.bytes / 1e6, m->workspace(p), c.depth);
      }
      s += line;
    }
    std::snprintf(text, size, "%s", s.c_str());
  });
}

lc_status lc_set_tuning(const char* text) {
  return guarded([&] { lc::set_tuning(text); });
}

const lc_method_info* lc_method(int index) {
  const lc_method_info* info = nullptr;
  guarded([&] {
    const lc::Methods all = lc::methods();
    if (index >= 0 && index < all.end() - all.begin()) info = &all.begin()[index]->info;
  });
  return info;
}

const char* lc_last_error(void) { return last_error.c_str(); }

int lc_version(void) { return LC_VERSION; }

const char* lc_build_info(void) {
  static thread_local std::string text;
  const lc_status status = guarded([&] {
    text = "version=" + std::to_string(LC_VERSION_MAJOR) + "." + std::to_string(LC_VERSION_MINOR) + "." +
           std::to_string(LC_VERSION_PATCH) + "\ncompiler=" LC_COMPILER "\nisa=" + lc::isa().name + "\nisas=";
    const char* separator = "";
    for (const lc::Isa& isa : lc::isas()) {
      text += separator + std::string(isa.name);
      separator = " ";
    }
#ifdef LC_WITH_CUDA
    text += "\ncuda=" + lc::cuda::versions();
#else
    text += "\ncuda=no";
#endif
    const lc::ThreadCount threads = lc::thread_count(0);
    text += "\nthreads=" + std::to_string(threads.count) + "\nthreads_source=" + threads.source;
  });
  return status == LC_OK ? text.c_str() : "";
}

void lc_set_num_threads(int n) { lc::set_num_threads(n); }

int lc_num_threads(void) { return lc_thread_count(0, nullptr); }

int lc_thread_count(int32_t framework, const char** source) {
  int count = 1;
  const char* from = "LEETCORE_NUM_THREADS, which is not a number";
  guarded([&] {
    const lc::ThreadCount threads = lc::thread_count(framework);
    count = threads.count, from = threads.source;
  });
  if (source) *source = from;
  return count;
}
