// All kernels of convolutions and norms in one table, for a module that is not linked with them:
// the autograd nodes of csrc/nodes, which are built for one version of PyTorch.
#pragma once

#include <string>

#include "cpu/depthwise.h"
#include "cpu/isa.h"
#include "cpu/norm_act.h"
#include "cpu/pointwise.h"
#include "cpu/windows.h"

namespace dmcp::cpu {

// To be counted up with every change of Table or of what its kernels take.
constexpr int64_t kTableVersion = 1;

struct Table {
  std::string isa;  // the best one that this machine runs
  decltype(&norm_act_kernels) norm_act;
  decltype(&depthwise_kernels) depthwise;
  decltype(&pointwise_kernels) pointwise;
  decltype(&gather_windows) gather;
  decltype(&scatter_windows) scatter;
};

inline const Table& table() {
  static const Table table{isas().back(),      &norm_act_kernels, &depthwise_kernels,
                           &pointwise_kernels, &gather_windows,   &scatter_windows};
  return table;
}

}  // namespace dmcp::cpu
