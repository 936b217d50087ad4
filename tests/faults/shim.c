/* Counts the system calls that change the disk below one folder, and makes one of them fail or kill the process.

   cc -shared -fPIC -O1 -o shim.so shim.c;  LD_PRELOAD=shim.so python ...;  armed through ctypes (see disk_faults.py)

   Each function stands before libc's own of that name and makes the system call itself. A kill comes before the call
   is made; in a write, after half of it, so that torn files are met too. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { KILL = -1, COUNT = 0 };                                   /* else: the errno to fail with */
enum { LASTING = 1, NO_EXCHANGE = 2, NO_SYNC = 4 };
enum { TAKES_SPACE = 1, FREES = 0 };                             /* a full disk still deletes and renames */

static char folder[PATH_MAX];
static size_t folder_length;
static long calls, due;
static int action, flags, log_fd = -1;
static long clock_offset;

/* Everything below `path` is watched from now on; `action` comes at call `at` (from 1), and `LASTING` at all after. */
void fault_arm(const char *path, long at, int what, int options, int log) {
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    calls = 0, due = at, action = what, flags = options, log_fd = log;
}
void fault_clock(long seconds) { clock_offset = seconds; }

/* A signal comes after so many microseconds. The kernel sends it, however busy other processes keep the machine. */
void fault_signal(int number, long microseconds) {
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = number};
    struct itimerspec when = {.it_value = {microseconds / 1000000, microseconds % 1000000 * 1000 + 1}};
    int timer;
    syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer);
    syscall(SYS_timer_settime, timer, 0, &when, NULL);
}

static int watched(int at, const char *path, char *whole) {
    char base[PATH_MAX] = "", link[64];
    if (!folder_length) return 0;
    if (path == NULL || path[0] != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        if (readlink(link, base, sizeof base - 1) < 0) return 0;
    }
    snprintf(whole, 2 * PATH_MAX, "%s%s%s", base, path && path[0] != '/' ? "/" : "", path ? path : "");
    return !strncmp(whole, folder, folder_length) && (whole[folder_length] == '/' || !whole[folder_length]);
}

/* 1 if the call must not be made as it is; `errno` is set then. 2: the first write of a disk that fills up. */
static int strikes(const char *name, int at, const char *path, const char *other, int kind) {
    char whole[2 * PATH_MAX], second[2 * PATH_MAX];
    if (!watched(at, path, whole)) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0)
        dprintf(log_fd, "%s\t%s\t%s\n", name, whole, other && watched(at, other, second) ? second : "");
    if (action == COUNT || number < due || (number > due && !(flags & LASTING))) return 0;
    if (action == ENOSPC && (flags & LASTING) && kind == FREES) return 0;
    errno = action;
    return number == due && (flags & LASTING) ? 2 : 1;
}
static int die(void) { return syscall(SYS_kill, getpid(), SIGKILL), -1; }
#define STRIKE(...) if (strikes(__VA_ARGS__)) return action == KILL ? die() : -1

static int open_at(int at, const char *path, int how, mode_t mode) {
    if (how & (O_CREAT | O_TRUNC)) STRIKE("open", at, path, NULL, TAKES_SPACE);
    return syscall(SYS_openat, at, path, how, mode);
}
#define MODE(last) mode_t mode = 0; if (how & O_CREAT) { va_list l; va_start(l, last); mode = va_arg(l, mode_t); va_end(l); }
int open(const char *path, int how, ...) { MODE(how) return open_at(AT_FDCWD, path, how, mode); }
int open64(const char *path, int how, ...) { MODE(how) return open_at(AT_FDCWD, path, how, mode); }
int openat(int at, const char *path, int how, ...) { MODE(how) return open_at(at, path, how, mode); }
int openat64(int at, const char *path, int how, ...) { MODE(how) return open_at(at, path, how, mode); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    int strike = strikes("write", fd, NULL, NULL, TAKES_SPACE);
    if (strike && action == KILL) return syscall(SYS_write, fd, data, size / 2), die();
    if (strike == 2 && action == ENOSPC && size > 1) return syscall(SYS_write, fd, data, size / 2);
    return strike ? -1 : syscall(SYS_write, fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    STRIKE("writev", fd, NULL, NULL, TAKES_SPACE);
    return syscall(SYS_writev, fd, parts, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t place) {
    STRIKE("pwrite", fd, NULL, NULL, TAKES_SPACE);
    return syscall(SYS_pwrite64, fd, data, size, place);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return pwrite64(fd, data, size, place); }

int renameat2(int from, const char *old, int to, const char *new, unsigned how) {
    if (how && (flags & NO_EXCHANGE)) return errno = EINVAL, -1;
    STRIKE(how ? "exchange" : "rename", from, old, new, FREES);
    return syscall(SYS_renameat2, from, old, to, new, how);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int mkdirat(int at, const char *path, mode_t mode) {
    STRIKE("mkdir", at, path, NULL, TAKES_SPACE);
    return syscall(SYS_mkdirat, at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int at, const char *path, int how) {
    STRIKE(how & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, NULL, FREES);
    return syscall(SYS_unlinkat, at, path, how);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int remove(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int fchmodat(int at, const char *path, mode_t mode, int how) {
    STRIKE("chmod", at, path, NULL, FREES);
    return syscall(SYS_fchmodat, at, path, mode, how);
}
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
int fchmod(int fd, mode_t mode) {
    STRIKE("chmod", fd, NULL, NULL, FREES);
    return syscall(SYS_fchmod, fd, mode);
}
int fsync(int fd) {
    STRIKE("fsync", fd, NULL, NULL, TAKES_SPACE);
    return flags & NO_SYNC ? 0 : syscall(SYS_fsync, fd);
}
int fdatasync(int fd) { return fsync(fd); }
int ftruncate64(int fd, off_t size) {
    STRIKE("truncate", fd, NULL, NULL, FREES);
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int fallocate64(int fd, int how, off_t place, off_t size) {
    STRIKE("fallocate", fd, NULL, NULL, TAKES_SPACE);
    return syscall(SYS_fallocate, fd, how, place, size);
}
int fallocate(int fd, int how, off_t place, off_t size) { return fallocate64(fd, how, place, size); }
int posix_fallocate64(int fd, off_t place, off_t size) { return fallocate64(fd, 0, place, size) ? errno : 0; }
int posix_fallocate(int fd, off_t place, off_t size) { return posix_fallocate64(fd, place, size); }

/* A clock that was set: the date, and not the time since the machine started. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (!status && clock == CLOCK_REALTIME) now->tv_sec += clock_offset;
    return status;
}
time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
