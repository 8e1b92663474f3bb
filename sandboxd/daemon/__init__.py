"""What makes a process a daemon: logs, listening sockets, the service manager, reload, hardening."""
