// cufft.cu - implements cufft.h. The entry points are declared here, as in the "cuFFT API
// Reference". They are the same in cuFFT 11 (CUDA 12) and cuFFT 12 (CUDA 13).
#include "cufft.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <tuple>

#include "../environment.h"
#include "device.h"

namespace lc::cuda {
namespace {

constexpr const char* kSonames[] = {"libcufft.so.12", "libcufft.so.11"};
constexpr int kC2C = 0x29, kZ2Z = 0x69, kAllocFailed = 2;

struct Cufft {
  int (*create)(int* plan);
  int (*destroy)(int plan);
  int (*set_auto_allocation)(int plan, int on);
  int (*make_plan_many)(int plan, int rank, long long* n, long long* inembed, long long istride, long long idist,
                        long long* onembed, long long ostride, long long odist, int type, long long batch,
                        size_t* work_bytes);
  int (*set_stream)(int plan, void* stream);
  int (*set_work_area)(int plan, void* work);
  int (*exec_c2c)(int plan, void* in, void* out, int direction);
  int (*exec_z2z)(int plan, void* in, void* out, int direction);
};

bool readable(const std::string& path) { return access(path.c_str(), R_OK) == 0; }

// A name for dlopen, or an empty string. Searches in this order: the user's choice, libraries that
// the process has loaded, wheels next to this library (which is in site-packages/leetcore), the
// toolkit, the loader's own search. Only the last search has to load the library.
std::string find() {
  if (const std::string& wish = environment().cufft; !wish.empty())
    return wish.find('/') == std::string::npos || readable(wish) ? wish : "";
  for (const char* soname : kSonames)
    if (void* library = dlopen(soname, RTLD_LAZY | RTLD_NOLOAD)) {
      dlclose(library);
      return soname;
    }

  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&cufft_missing), &self)) {
    std::string folder = self.dli_fname;
    for (int up = 0; up < 4; ++up) {
      folder.resize(std::min(folder.size(), folder.rfind('/')));
      for (const char* wheel : {"/nvidia/cu13/lib/libcufft.so.12", "/nvidia/cufft/lib/libcufft.so.11"})
        if (readable(folder + wheel)) return folder + wheel;
    }
  }
  for (const char* soname : kSonames)
    if (const std::string path = std::string("/usr/local/cuda/lib64/") + soname; readable(path)) return path;
  for (const char* soname : kSonames)
    if (dlopen(soname, RTLD_LAZY)) return soname;
  return "";
}

const std::string& library_path() {
  static const std::string found = find();
  return found;
}

template <class F>
void resolve(void* library, F*& f, const char* name) {
  f = reinterpret_cast<F*>(dlsym(library, name));
  if (!f) fail(LC_DEVICE, "cuFFT: %s", dlerror());
}

const Cufft& cufft() {
  static const Cufft loaded = [] {
    void* library = dlopen(library_path().c_str(), RTLD_LAZY);
    if (!library) fail(LC_DEVICE, "cuFFT: %s", dlerror());
    Cufft c;
    resolve(library, c.create, "cufftCreate");
    resolve(library, c.destroy, "cufftDestroy");
    resolve(library, c.set_auto_allocation, "cufftSetAutoAllocation");
    resolve(library, c.make_plan_many, "cufftMakePlanMany64");
    resolve(library, c.set_stream, "cufftSetStream");
    resolve(library, c.set_work_area, "cufftSetWorkArea");
    resolve(library, c.exec_c2c, "cufftExecC2C");
    resolve(library, c.exec_z2z, "cufftExecZ2Z");
    return c;
  }();
  return loaded;
}

void check(int result, const char* function, const Transforms& t) {
  if (result)
    fail(result == kAllocFailed ? LC_MEMORY : LC_DEVICE, "%s: result %d, for %lld transforms of %lld points", function,
         result, static_cast<long long>(t.batch), static_cast<long long>(t.points));
}

struct Plan {
  int handle;
  size_t work_bytes;
};

// Serializes calls: a plan keeps its stream and its work area from one call of cuFFT to the next.
std::mutex mutex;

Plan make(const Transforms& t) {
  const Cufft& c = cufft();
  Plan plan = {};
  check(c.create(&plan.handle), "cufftCreate", t);
  long long n = t.points;
  int result = c.set_auto_allocation(plan.handle, 0);
  if (!result)
    result = c.make_plan_many(plan.handle, 1, &n, nullptr, 1, n, nullptr, 1, n, t.f64 ? kZ2Z : kC2C, t.batch,
                              &plan.work_bytes);
  if (result) c.destroy(plan.handle);
  check(result, "cufftMakePlanMany64", t);
  return plan;
}

// Plans are never destroyed: this would synchronize, and free memory that a CUDA graph uses.
const Plan& plan_of(int device, const Transforms& t) {
  static std::map<std::tuple<int, bool, int64_t, int64_t>, Plan> plans;
  const auto key = std::make_tuple(device, t.f64, t.points, t.batch);
  auto known = plans.find(key);
  if (known == plans.end()) {
    const DeviceGuard guard(device);
    known = plans.emplace(key, make(t)).first;
  }
  return known->second;
}

}  // namespace

const char* cufft_missing() {
  return library_path().empty() ? "needs cuFFT, which was not found: pip install nvidia-cufft, or name its file in the "
                                  "environment variable LEETCORE_CUFFT"
                                : nullptr;
}

size_t transform_bytes(int device, const Transforms& t) {
  const std::lock_guard<std::mutex> lock(mutex);
  return plan_of(device, t).work_bytes;
}

void transform(const Problem& p, const Transforms& t, Direction direction, void* data, void* work) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Cufft& c = cufft();
  const int plan = plan_of(p.device.id, t).handle;
  check(c.set_stream(plan, p.stream), "cufftSetStream", t);
  check(c.set_work_area(plan, work), "cufftSetWorkArea", t);
  if (t.f64)
    check(c.exec_z2z(plan, data, data, int(direction)), "cufftExecZ2Z", t);
  else
    check(c.exec_c2c(plan, data, data, int(direction)), "cufftExecC2C", t);
}

}  // namespace lc::cuda
