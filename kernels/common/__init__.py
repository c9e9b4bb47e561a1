"""What every low-bit operation shares: byte layout, dispatch, tuned tables, devices, lowering without a device."""
