/* SPDX-License-Identifier: GPL-2.0 */
/* Programs here never ask for the kernel version: they ask for what the kernel has. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
