/* SPDX-License-Identifier: GPL-2.0 */
/* bcc brings its own bpf_log2(). */
