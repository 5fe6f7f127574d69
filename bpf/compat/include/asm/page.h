/* SPDX-License-Identifier: GPL-2.0 */
/* bcc counts the size of a ring buffer in these, whatever the size of the kernel's pages. */
#ifndef PAGE_SIZE
#define PAGE_SIZE 4096
#endif
