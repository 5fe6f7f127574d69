/* SPDX-License-Identifier: GPL-2.0 */
/* The BPF instruction classes are in the uapi header that bcc carries. */
#include <linux/types.h>
