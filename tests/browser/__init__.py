"""Tests that need a browser: Chromium and Playwright."""
