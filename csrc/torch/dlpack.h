// The part of DLPack 1 (https://dmlc.github.io/dlpack) that reads a tensor of Python without a copy of anything.
#pragma once

#include <cstdint>

extern "C" {

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
enum { kDLCPU = 1 };

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    struct {
      uint32_t major;
      uint32_t minor;
    } version;
    void* prev_api;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // 0, or −1 with Python's error set
  void* current_work_stream;
};

}  // extern "C"
