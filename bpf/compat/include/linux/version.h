/* SPDX-License-Identifier: GPL-2.0 */
/* The programs check for features of the kernel, and never for its version. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
