"""Runs programs that nobody has read, so that whatever they do ends with them.

What it covers, on Linux with bubblewrap:

- Files: a program sees the system's programs and libraries read-only, a device folder without devices, and a small
  folder in memory that is its own. No home, no /tmp, no other program's files, no names from /etc but the few that
  interpreters need.
- Network: a network of its own in which not even the loopback of the host exists; no sockets of other families.
- Processes: a process namespace of its own, so no signal reaches anything else, and what it leaves behind dies with it.
- Rights: no capability, no way to gain one, no new namespaces (`seccomp.py`). Where secateur runs as root each program
  runs as a user without a name that nothing else runs as.
- Resources: time, memory, processes, file sizes, what it writes on its outputs (`limits.py`). Where control groups can
  be made (`groups.py`), the kernel counts memory and processes, its own memory for them included.

What it does not cover: holes in the kernel (a virtual machine would), timing channels, how much of the processor,
of the caches and of the memory's bandwidth programs take from others while their time lasts, without control groups
memory of the kernel's own (of open files, sockets, empty files), which nothing but time bounds then, and what may be
read of the machine in /usr and /proc (versions, processors, load).

Nothing here knows benchmarks or languages. Without a sandbox nothing runs (`SandboxError`), unless the caller asks for
`Unconfined`, which has the limits and nothing else.
"""
