#include "cuda/device.h"

namespace limbeck::cuda {

extern const KernelFamily* const cuda_families[];
extern const int cuda_family_count;

std::vector<const KernelFamily*> families() { return {cuda_families, cuda_families + cuda_family_count}; }

std::shared_ptr<void> imagine(int architecture, int processors, size_t memory) {
  auto device = std::make_shared<Device>();
  device->architecture = architecture;
  device->processors = processors;
  device->memory = memory;
  device->shared_per_block = static_cast<size_t>(architecture >= 90 ? 227 : architecture == 80 ? 163 : 99) * 1024;
  return device;
}

}  // namespace limbeck::cuda
