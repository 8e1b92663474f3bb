"""The daemon as a process: logs, listening sockets, the service manager, reload, hardening."""
