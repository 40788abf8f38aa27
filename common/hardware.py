"""What the machine can do."""

import torch


def multiplies_bfloat16() -> bool:
    """Whether the hardware has bfloat16 matrix arithmetic; a CPU without it takes a hundred times as long."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
