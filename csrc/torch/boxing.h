// Registering C++ functions as torch operators through the stable C interface: the dispatcher hands
// over a stack of 64-bit words, one per argument, and takes the results back the same way
// (StableIValue).
#pragma once

#include <string.h>

#include <type_traits>

#include "tensor.h"

namespace fal::torch_binding {

template <class T>
struct Word {  // int64_t, double, bool
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "unsupported operator type");
  static T load(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
  static uint64_t store(T value) {
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
  }
};

template <>
struct Word<Tensor> {
  static Tensor load(uint64_t word) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(word)); }
  static uint64_t store(Tensor t) { return reinterpret_cast<uint64_t>(t.release()); }
};

template <class T>
struct Word<std::optional<T>> {  // null, or a word on the heap that belongs to us
  static std::optional<T> load(uint64_t word) {
    if (!word) return {};
    auto* inner = reinterpret_cast<uint64_t*>(word);
    std::optional<T> value(Word<T>::load(*inner));
    delete inner;
    return value;
  }
};

template <>
struct Word<std::string> {
  static std::string load(uint64_t word) {
    auto* handle = reinterpret_cast<StringOpaque*>(word);
    size_t length;
    const char* text;
    FAL_TORCH(torch_string_length(handle, &length));
    FAL_TORCH(torch_string_c_str(handle, &text));
    std::string value(text, length);
    torch_delete_string(handle);
    return value;
  }
  static uint64_t store(const std::string& value) {
    StringOpaque* handle;
    FAL_TORCH(torch_new_string_handle(value.data(), value.size(), &handle));
    return reinterpret_cast<uint64_t>(handle);
  }
};

// Takes the arguments off the stack, in the schema's order. Every handle taken is owned by the
// caller.
class StackReader {
 public:
  StackReader(const uint64_t* stack, uint64_t inputs) : stack_(stack), inputs_(inputs) {}

  template <class T>
  StackReader& operator>>(T& value) {
    FAL_CHECK(next_ < inputs_, "flashattn_lite: operator schema and function disagree");
    value = Word<T>::load(stack_[next_++]);
    return *this;
  }

 private:
  const uint64_t* stack_;
  uint64_t inputs_, next_ = 0;
};

template <class... T>
void put_results(uint64_t* stack, T... values) {
  ((*stack++ = Word<T>::store(std::move(values))), ...);
}

using BoxedFunction = void (*)(uint64_t* stack, uint64_t inputs, uint64_t outputs);

class Library {
 public:
  static Library define(const char* name) {
    Library library;
    FAL_TORCH(aoti_torch_library_init_def(name, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  // More schemas for a library that another file defines.
  static Library fragment(const char* name) {
    Library library;
    FAL_TORCH(aoti_torch_library_init_fragment(name, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  static Library implement(const char* name, const char* dispatch_key) {
    Library library;
    FAL_TORCH(
        aoti_torch_library_init_impl(name, dispatch_key, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  Library& schema(const std::string& text) {
    FAL_TORCH(aoti_torch_library_def(handle_, text.c_str()));
    return *this;
  }
  Library& function(const char* name, BoxedFunction function) {
    FAL_TORCH(torch_library_impl(handle_, name, function, kCallingConvention));
    return *this;
  }

 private:
  // How words are laid out on the stack: as torch 2.10 does it, whatever torch runs it.
  static constexpr uint64_t kCallingConvention = (2ULL << 56) | (10ULL << 48);
  TorchLibraryOpaque* handle_ = nullptr;
};

}  // namespace fal::torch_binding
