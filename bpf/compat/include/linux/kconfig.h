/* SPDX-License-Identifier: GPL-2.0 */
#ifndef CWT_KCONFIG_H
#define CWT_KCONFIG_H
/* bcc includes this before anything else. Its own headers need this option for the map helpers. */
#define CONFIG_BPF_SYSCALL 1
#endif
