// Asynchronous products of running blocks: what the scheduler tells tensor_core.cpp.
#pragma once

namespace limbeck::cuda::emulate {

void begin_products();
void end_of_thread_products();  // of the current thread
void end_of_products();

}  // namespace limbeck::cuda::emulate
