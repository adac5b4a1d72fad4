#include "cuda/device.h"

namespace limbeck::cuda {

extern const KernelFamily* const cuda_families[];
extern const int cuda_family_count;

std::vector<const KernelFamily*> families() { return {cuda_families, cuda_families + cuda_family_count}; }

void check_architecture(int architecture, const std::string& name) {
  if (architecture >= kOldestArchitecture) return;
  const std::string version = std::to_string(architecture / 10) + "." + std::to_string(architecture % 10);
  throw Error(ErrorKind::device, "ERR_CUDA_ARCHITECTURE",
              "init: " + name + " has compute capability " + version + ", 8.0 or newer is needed (A100, RTX 30 and later); use device \"cpu\"")
      .in("init").on("device").wanted("compute capability 8.0").got(version);
}

std::shared_ptr<void> imagine(int architecture, int processors, size_t memory) {
  auto device = std::make_shared<Device>();
  device->architecture = architecture;
  device->processors = processors;
  device->memory = memory;
  device->shared_per_block = static_cast<size_t>(architecture >= 90 ? 227 : architecture == 80 ? 163 : 99) * 1024;
  return device;
}

}  // namespace limbeck::cuda
