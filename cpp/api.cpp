// api.cpp - the C entry points: they check a call, choose a method and run it. Exceptions become
// status codes here and in no other file.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

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

// The struct of an older caller is shorter: the members that it lacks read as absent.
template <class Args>
Args widen(const Args* a) {
  if (!a) lc::fail(LC_INVALID, "args: expected a pointer to the arguments, got NULL");
  Args full = {};
  std::memcpy(&full, a, std::min<size_t>(a->struct_size, sizeof full));
  return full;
}

// Refuses a workspace that is too small or not aligned.
template <class P>
void require_workspace(const P& p, size_t needed, const char* who) {
  if (p.workspace_bytes < needed)
    lc::fail(LC_MEMORY, "workspace: %s needs %zu bytes, got %zu", who, needed, p.workspace_bytes);
  const int alignment = p.device.type == LC_CUDA ? 256 : 64;
  if (needed && (!p.workspace || reinterpret_cast<uintptr_t>(p.workspace) % alignment))
    lc::fail(LC_MEMORY, "workspace: expected an address that is a multiple of %d, got %p", alignment, p.workspace);
}

// Runs the problem of a call on the CPU until its end, or until the caller's function asks for it.
template <class Args, class P>
void run_interruptibly(const Args& a, P& p, void (*run)(const P&)) {
  if (!a.interrupt) return run(p);
  lc::Interrupt interrupt(a.interrupt, a.interrupt_context);
  p.interrupt = &interrupt;
  run(p);
  if (interrupt.stopped())
    lc::fail(LC_INTERRUPTED, "interrupt: asked for the end of the call; the outputs are undefined");
}

lc_candidate answer(const lc::Method& m, const lc::Problem& p) {
  lc_candidate row = {};
  row.method = m.info.name;
  row.device = m.info.device;
  row.refusal = lc::refusal(m, p);
  if (row.refusal) return row;
  const auto [cost, correction, microseconds] = lc::predict(m, p);
  row.bound = cost.bound;
  row.flop = cost.flop;
  row.least_bytes = cost.least_bytes;
  row.bytes = cost.bytes;
  row.depth = cost.depth;
  row.workspace = m.workspace(p);
  row.model_us = cost.microseconds;
  row.correction = correction;
  row.microseconds = microseconds;
  return row;
}

// ---- the text of lc_explain ---------------------------------------------------------------------

std::string why(const lc::Choice& chosen) {
  const std::string by = chosen.decided_by, name = chosen.method->info.name;
  if (by == "prediction")
    return "the shortest prediction decides: " + name + " (tuning table: " + lc::tuning_source() + ")\n";
  if (by == "only") return "only " + name + " serves this call\n";
  return by + " names " + name + "\n";
}

std::string line(const lc_candidate& row, const lc::Choice& chosen, bool is_chosen) {
  char text[400];
  if (row.refusal) {
    std::snprintf(text, sizeof text, "  %-10s %-4s  cannot: %s\n", row.method, row.device, row.refusal);
    return text;
  }
  char verdict[40] = "chosen";
  if (!is_chosen)
    std::snprintf(verdict, sizeof verdict, "%.2f times the chosen", row.microseconds / chosen.prediction.microseconds);
  std::snprintf(text, sizeof text,
                "%c %-10s %-4s  %s: predicted %.1f us (model %.1f us x correction %.2f, bound by %s), %.4g Mflop, "
                "%.4g MB moved, workspace %llu bytes, depth %.0f\n",
                is_chosen ? '*' : ' ', row.method, row.device, verdict, row.microseconds, row.model_us, row.correction,
                row.bound, row.flop / 1e6, row.bytes / 1e6, static_cast<unsigned long long>(row.workspace), row.depth);
  return text;
}

}  // namespace

lc_status lc_run(const lc_args* args) {
  return guarded([&] {
    const lc_args a = widen(args);
    lc::Problem p = lc::check(a);
    const lc::Method& m = *lc::choose(p, a.method).method;
    require_workspace(p, m.workspace(p), (std::string("method ") + m.info.name).c_str());
#ifdef LC_WITH_CUDA
    if (p.device.type == LC_CUDA) {
      const lc::cuda::DeviceGuard guard(p.device.id);
      return m.run(p);
    }
#endif
    run_interruptibly(a, p, m.run);
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
    const lc::Cost& c = chosen.prediction.cost;
    const lc_cost full = {
        chosen.method->info.name,      c.flop, c.least_bytes, c.bytes, chosen.method->workspace(p), c.depth,
        chosen.prediction.microseconds};
    std::memcpy(cost, &full, std::min(size, sizeof full));
  });
}

lc_status lc_candidate_at(const lc_args* args, int index, lc_candidate* candidate, size_t size) {
  return guarded([&] {
    if (!candidate) lc::fail(LC_INVALID, "candidate: expected a pointer, got NULL");
    const lc::Methods all = lc::methods();
    const int count = int(all.end() - all.begin());
    if (index < 0 || index >= count)
      lc::fail(LC_INVALID, "index: expected 0 to %d, the methods of this build, got %d", count - 1, index);
    const lc_candidate full = answer(*all.begin()[index], lc::check_structure(widen(args)));
    std::memcpy(candidate, &full, std::min(size, sizeof full));
  });
}

lc_status lc_choose(const lc_args* args, lc_choice* choice, size_t size) {
  return guarded([&] {
    if (!choice) lc::fail(LC_INVALID, "choice: expected a pointer, got NULL");
    const lc_args a = widen(args);
    const lc::Choice chosen = lc::choose(lc::check_structure(a), a.method);
    const lc::Methods all = lc::methods();
    const auto index = std::find(all.begin(), all.end(), chosen.method) - all.begin();
    const lc_choice full = {int32_t(index), chosen.decided_by, lc::tuning_source()};
    std::memcpy(choice, &full, std::min(size, sizeof full));
  });
}

lc_status lc_explain(const lc_args* args, char* text, size_t size) {
  return guarded([&] {
    if (!text || !size) lc::fail(LC_INVALID, "text: expected a buffer of at least one byte, got none");
    const lc_args a = widen(args);
    const lc::Problem p = lc::check_structure(a);
    const lc::Choice chosen = lc::choose(p, a.method);
    std::string s = why(chosen);
    for (const lc::Method* m : lc::methods()) s += line(answer(*m, p), chosen, m == chosen.method);
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

const char* lc_method_serves(int index) {
  const char* words = nullptr;
  guarded([&] {
    static const std::vector<std::string> all = [] {
      std::vector<std::string> texts;
      for (const lc::Method* m : lc::methods()) texts.push_back(lc::names(m->serves.features));
      return texts;
    }();
    if (index >= 0 && index < int(all.size())) words = all[size_t(index)].c_str();
  });
  return words;
}

lc_status lc_conv_run(const lc_conv_args* args) {
  return guarded([&] {
    const lc_conv_args a = widen(args);
    lc::ConvProblem p = lc::check_conv(a);
    const lc::Conv& conv = *lc::isa().conv;
    require_workspace(p, conv.workspace(p), "the convolution");
    run_interruptibly(a, p, conv.run);
  });
}

lc_status lc_conv_workspace(const lc_conv_args* args, size_t* bytes) {
  return guarded([&] {
    if (!bytes) lc::fail(LC_INVALID, "bytes: expected a pointer, got NULL");
    const lc::ConvProblem p = lc::check_conv_structure(widen(args));
    *bytes = p.device.type == LC_CPU ? lc::isa().conv->workspace(p) : 0;
  });
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
    count = threads.count;
    from = threads.source;
  });
  if (source) *source = from;
  return count;
}
