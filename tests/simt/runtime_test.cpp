// runtime_test.cpp - tests calls for a device through the C interface, on the emulated devices:
// what is refused and with which message, which stream and device a kernel gets, and that the host
// reads no device memory.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <leetcore/leetcore.hpp>

#include "../../cpp/simt/simt.h"
#include "../cpp/call.h"
#include "device_host.h"

namespace {

using namespace test;

Spec on_device(int id = 0) {
  Spec spec;
  spec.device = {LC_CUDA, id};
  return spec;
}

class Runtime : public ::testing::Test {
 protected:
  void TearDown() override {
    simt::options() = {};
    simt::report() = {};
    simt::forget();
  }

  static void allow(Call& call) {
    for (const Tensor* t : call.tensors())
      if (!t->memory.empty()) simt::allow(t->memory.data(), t->memory.size(), true);
    simt::allow(call.scratch.data(), call.scratch.size(), true);
  }
  static lc_status run(Call& call) {
    const lc_status status = call.make_workspace();
    if (status != LC_OK) return status;
    allow(call);
    return lc_run(&call.args);
  }
  // Checks that run() fails with this message, and that nothing was launched or written.
  static void refused(Call& call, lc_status status, const std::string& text) {
    const auto before = call.memory();
    EXPECT_EQ(status, run(call));
    EXPECT_EQ(text, lc_last_error());
    EXPECT_EQ(0, simt::report().launches);
    EXPECT_TRUE(before == call.memory());
  }
};

TEST_F(Runtime, TensorsAreOnOneDevice) {
  const auto moved = [](Tensor Call::* which, lc_device to, const std::string& text) {
    Spec spec = on_device();
    spec.initial = spec.final = true;
    Call call(spec);
    (call.*which).device = to;
    refused(call, LC_INVALID, text);
  };
  moved(&Call::k, {LC_CPU, 0}, "k: expected on CUDA device 0 like q, got the CPU");
  moved(&Call::v, {LC_CUDA, 1}, "v: expected on CUDA device 0 like q, got CUDA device 1");
  moved(&Call::log_decay, {LC_CPU, 0}, "log_decay: expected on CUDA device 0 like q, got the CPU");
  moved(&Call::initial_state, {LC_CPU, 0}, "initial_state: expected on CUDA device 0 like q, got the CPU");
  moved(&Call::final_state, {LC_CUDA, 1}, "final_state: expected on CUDA device 0 like q, got CUDA device 1");
  moved(&Call::o, {LC_CPU, 0}, "o: expected on CUDA device 0 like q, got the CPU");
  moved(&Call::q, {LC_CPU, 0}, "k: expected on the CPU like q, got CUDA device 0");
  moved(&Call::q, {7, 0}, "q: expected on the CPU or a CUDA device, got a device of type 7");
}

TEST_F(Runtime, ScalarsAreOnTheHost) {
  Spec spec = on_device();
  spec.decay = Decay::scalar;
  Call call(spec);
  call.log_decay.device = spec.device;
  refused(call, LC_INVALID, "log_decay: expected on the CPU as every scalar, got CUDA device 0");
  Call positive(spec);
  store(positive.log_decay.data, kF32, 0.5);
  refused(positive, LC_INVALID, "log_decay: expected values <= 0, got 0.5");
}

TEST_F(Runtime, NoSuchDevice) {
  for (int id : {2, 64, -1}) {
    Call call(on_device(id));
    refused(call, LC_DEVICE, "CUDA device " + std::to_string(id) + ": expected one of 2 devices");
    char text[64];
    EXPECT_EQ(LC_DEVICE, lc_explain(&call.args, text, sizeof text));
    lc_cost cost;
    EXPECT_EQ(LC_DEVICE, lc_predict(&call.args, &cost, sizeof cost));
  }
}

// Every method exists on two devices. A refusal lists the methods for the tensors' device.
TEST_F(Runtime, RefusalsNameTheMethodsOfTheDevice) {
  Call call(on_device());
  call.args.method = "no such method";
  EXPECT_EQ(LC_INVALID, run(call));
  std::string text = lc_last_error();
  EXPECT_EQ(0u, text.find("method: unknown method 'no such method'; known are auto, ")) << text;
  EXPECT_EQ(text.find(", chunk"), text.rfind(", chunk")) << text;
  Spec spec = on_device();
  spec.decay = Decay::token;
  Call token(spec);
  token.args.method = "fft";  // which does not serve a decay per token
  EXPECT_EQ(LC_UNSUPPORTED, run(token));
  text = lc_last_error();
  EXPECT_NE(std::string::npos, text.find("\n  chunk: serves it")) << text;
  EXPECT_EQ(std::string::npos, text.find("another device")) << text;
}

// Every row that needs a workspace, with too little, none, or one whose address is not a multiple
// of 256.
TEST_F(Runtime, Workspace) {
  for (int i = 0; const lc_method_info* method = lc_method(i); ++i) {
    if (std::strcmp(method->device, "cuda")) continue;
    SCOPED_TRACE(method->name);
    Spec spec = on_device();
    spec.N = 300;
    Call call(spec);
    call.args.method = method->name;
    ASSERT_EQ(LC_OK, call.make_workspace()) << lc_last_error();
    if (!call.args.workspace_bytes) continue;
    const long launches = simt::report().launches;
    allow(call);
    --call.args.workspace_bytes;
    EXPECT_EQ(LC_MEMORY, lc_run(&call.args));
    EXPECT_EQ(0u, std::string(lc_last_error()).find(std::string("workspace: method ") + method->name + " needs "));
    ++call.args.workspace_bytes;
    void* const good = call.args.workspace;
    for (void* bad : {static_cast<void*>(nullptr), static_cast<void*>(static_cast<char*>(good) + 64)}) {
      call.args.workspace = bad;
      EXPECT_EQ(LC_MEMORY, lc_run(&call.args));
      EXPECT_EQ(0u, std::string(lc_last_error()).find("workspace: expected an address that is a multiple of 256, got"));
    }
    EXPECT_EQ(launches, simt::report().launches);
    call.args.workspace = good;
    EXPECT_EQ(LC_OK, lc_run(&call.args)) << lc_last_error();
  }
}

TEST_F(Runtime, KernelsGetTheStreamAndTheDeviceOfTheTensors) {
  simt::current_device() = 1;
  for (int id : {0, 1}) {
    Call call(on_device(id));
    call.args.stream = &call;
    ASSERT_EQ(LC_OK, run(call)) << lc_last_error();
    EXPECT_EQ(&call, simt::report().stream);
    EXPECT_EQ(id, simt::report().device);
    EXPECT_EQ(1, simt::current_device()) << "another device is current than before";
  }
  simt::current_device() = 0;
}

TEST_F(Runtime, AFailedLaunchNamesTheKernel) {
  Call call(on_device(1));
  ASSERT_EQ(LC_OK, call.make_workspace());
  EXPECT_EQ(LC_DEVICE, lc_run(&call.args));  // the emulator lets no kernel touch this memory
  const std::string text = lc_last_error();
  EXPECT_EQ(0u, text.find("kernel ")) << text;
  EXPECT_NE(std::string::npos, text.find(" on CUDA device 1: ")) << text;
  EXPECT_EQ(0, simt::current_device());
}

// A page that no thread may touch represents the memory of a GPU, which a host cannot read.
TEST_F(Runtime, TheHostReadsNoValue) {
  const size_t bytes = 1 << 16;
  void* page = mmap(nullptr, 10 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(MAP_FAILED, page);
  for (lc_op op : {LC_FORWARD, LC_DECODE})
    for (bool packed : {false, true}) {
      Spec spec = on_device();
      spec.op = op;
      spec.decay = Decay::token;
      if (op == LC_DECODE)
        spec.indices = {1, 0};
      else
        spec.initial = spec.final = true;
      if (packed && op == LC_DECODE) continue;
      if (packed) {
        spec.B = 1;
        spec.cu = {0, 2, 5};
      }
      Call call(spec);
      char* place = static_cast<char*>(page);
      for (Tensor* t : call.tensors()) {
        t->data = place;
        place += bytes;
      }
      size_t needed = 0;
      lc_cost cost;
      char text[8192];
      const lc_status status = lc_workspace(&call.args, &needed);
      EXPECT_TRUE(status == LC_OK || op == LC_DECODE) << lc_last_error();
      EXPECT_EQ(status, lc_predict(&call.args, &cost, sizeof cost));
      EXPECT_EQ(status, lc_explain(&call.args, text, sizeof text));
      Bytes scratch(needed + 256);
      call.args.workspace = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
      call.args.workspace_bytes = needed;
      const lc_status run = lc_run(&call.args);  // the emulator stops the kernel before it touches memory
      EXPECT_EQ(status == LC_OK ? LC_DEVICE : status, run) << lc_last_error();
    }
  munmap(page, 10 * bytes);
}

// The C++ interface on a device: all memory that the method needs belongs to the caller.
TEST_F(Runtime, CppFace) {
  std::vector<float> x(300 * 32, 0.01f), o(x.size());
  const auto tensor = [](std::vector<float>& data) {
    return leetcore::Tensor(data.data(), {1, 1, 300, 32}, {}, {LC_CUDA, 0});
  };
  simt::allow(x.data(), 4 * x.size(), false);
  simt::allow(o.data(), 4 * o.size(), true);
  alignas(256) static unsigned char memory[1 << 24];
  simt::allow(memory, sizeof memory, true);
  leetcore::Workspace workspace(memory, sizeof memory), host;
  leetcore::Options options;
  options.stream = &options;
  for (const lc_method_info& method : leetcore::methods()) {
    if (std::strcmp(method.device, "cuda")) continue;
    SCOPED_TRACE(method.name);
    options.method = method.name;
    options.workspace = &host;
    if (leetcore::linear_attention_workspace(tensor(x), tensor(x), tensor(x), {}, options)) {
      try {
        leetcore::linear_attention(tensor(x), tensor(x), tensor(x), {}, tensor(o), options);
        ADD_FAILURE() << "scratch of the host was taken";
      } catch (const leetcore::Error& e) {
        EXPECT_EQ(0u, std::string(e.what()).find("workspace: expected Workspace(memory, bytes) with "));
      }
      options.workspace = &workspace;
    }
    o.back() = -1;
    leetcore::linear_attention(tensor(x), tensor(x), tensor(x), {}, tensor(o), options);
    EXPECT_NEAR(300 * 32e-6, o.back(), 1e-6);
    EXPECT_EQ(&options, simt::report().stream);
  }
}

// Wrong values that the host cannot see: the call is served, and no kernel leaves the tensors.
TEST_F(Runtime, WrongValuesOnTheDevice) {
  Spec spec = on_device();
  Call growing(spec);
  growing.log_decay.fill([] { return 3.; });
  EXPECT_EQ(LC_OK, run(growing)) << lc_last_error();
  growing.log_decay.fill([] { return kNan; });
  EXPECT_EQ(LC_OK, run(growing)) << lc_last_error();

  for (lc_dtype dtype : {kI32, kI64})
    for (const Index& bounds :
         {Index{0, 90, 60}, Index{-7, 60, 1000}, Index{500, 700, 900}, Index{2147483647, -2147483647 - 1, 5}}) {
      Spec packed = on_device();
      packed.B = 1;
      packed.N = 90;
      packed.cu = {0, 50, 90};
      packed.cu_dtype = dtype;
      packed.initial = packed.final = true;
      for (int i = 0; const lc_method_info* method = lc_method(i); ++i) {
        if (std::strcmp(method->device, "cuda")) continue;
        SCOPED_TRACE(method->name);
        Call call(packed);
        Call::fill(call.cu_seqlens, bounds);
        call.args.method = method->name;
        const lc_status status = call.make_workspace();
        if (status == LC_UNSUPPORTED) continue;
        const auto before = call.memory();
        allow(call);
        EXPECT_EQ(LC_OK, lc_run(&call.args)) << lc_last_error();
        EXPECT_TRUE(call.stayed_inside(before));
        simt::forget();
      }
    }
}

}  // namespace
