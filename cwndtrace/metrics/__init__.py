# SPDX-License-Identifier: Apache-2.0
"""Figures of a running trace for a monitoring system: served to Prometheus, or sent by OTLP."""
