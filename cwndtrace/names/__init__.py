# SPDX-License-Identifier: Apache-2.0
"""Names of workloads and processes: a cgroup's unit, container and pod, from what runtimes leave on the disk."""
