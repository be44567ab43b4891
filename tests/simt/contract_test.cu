// contract_test.cu - the contracts of the primitives on a GPU: the program contract_gpu. The exit
// status is 0 if all contracts hold, 1 if one does not, 77 if there is no GPU.
#include "contract_test.cuh"

#include <cstdio>

namespace {

// Device memory, freed at the end of the scope.
struct Buffer {
  uint32_t* p = nullptr;
  explicit Buffer(size_t words) { error = cudaMalloc(&p, 4 * words); }
  ~Buffer() { cudaFree(p); }
  Buffer(const Buffer&) = delete;
  cudaError_t error;
};

// What is wrong, or an empty string.
std::string run(const contract::Case& c, cudaStream_t stream) {
  const Buffer in(c.in.size()), out(c.want.size());
  contract::Words got(c.want.size());
  if (in.error != cudaSuccess || out.error != cudaSuccess) return "out of memory";
  cudaMemcpy(in.p, c.in.data(), 4 * c.in.size(), cudaMemcpyHostToDevice);
  cudaMemset(out.p, 0xFF, 4 * got.size());
  if (const char* why = c.launch(in.p, out.p, stream)) return std::string(c.name) + ": " + why;
  cudaError_t error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) error = cudaMemcpy(got.data(), out.p, 4 * got.size(), cudaMemcpyDeviceToHost);
  return error == cudaSuccess ? contract::difference(c, got) : std::string(c.name) + ": " + cudaGetErrorString(error);
}

std::string run_refused(cudaStream_t stream) {
  const Buffer in(128), out(128);
  std::string wrong = contract::refused_launches(in.p, out.p, stream);
  if (wrong.empty() && cudaStreamSynchronize(stream) != cudaSuccess) wrong = "refused launches: the next one failed";
  return wrong;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) {
    std::puts("no CUDA device");
    return 77;
  }
  cudaStream_t stream;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return 1;
  int failed = 0;
  const auto tell = [&](const std::string& name, const std::string& wrong) {
    std::printf("%-8s %s\n", wrong.empty() ? "ok" : "FAILED", (wrong.empty() ? name : wrong).c_str());
    failed += !wrong.empty();
  };
  for (const contract::Case& c : contract::cases()) tell(c.name, run(c, stream));
  tell("refused launches", run_refused(stream));
  std::printf("%d failed\n", failed);
  return failed ? 1 : 0;
}
