/* LD_PRELOAD: makes the n-th change of files below a folder fail, and all later ones, or that one alone.

fault_arm(root, error, at, once) begins to count; at = 0 only counts. fault_count() is the number of changes so far.
fault_only(word): of paths with this word in them.
ENOSPC meets what needs room, EIO what goes to the disk, EROFS every change of a file or a name. Error -1: the process is
killed before the n-th change; what a kill leaves on the disk depends on nothing else. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FILES = 65536, MAKE = 1, WRITE = 2, SYNC = 4, NAME = 8 };
static char root[PATH_MAX], only[256], below[FILES];
static int error, at, once, count, kinds;

void fault_arm(const char *folder, int number, int place, int single) {
    strncpy(root, folder, sizeof root - 1);
    error = number; at = place; once = single; count = 0;
    kinds = number == -1 ? MAKE | WRITE | SYNC | NAME : number == ENOSPC ? MAKE | WRITE : number == EIO ? WRITE | SYNC : MAKE | WRITE | NAME;
}
void fault_only(const char *word) { strncpy(only, word, sizeof only - 1); }
int fault_count(void) { return count; }

static int inside(int folder, const char *path) {
    char whole[2 * PATH_MAX], start[PATH_MAX], link[64];
    if (!root[0] || !path) return 0;
    if (path[0] == '/') start[0] = 0;
    else if (folder == AT_FDCWD) { if (!getcwd(start, sizeof start)) return 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, start, sizeof start - 1);
        if (n < 0) return 0;
        start[n] = 0;
    }
    snprintf(whole, sizeof whole, "%s%s%s", start, start[0] ? "/" : "", path);
    size_t n = strlen(root);
    return !strncmp(whole, root, n) && (whole[n] == '/' || !whole[n]) && strstr(whole + n, only);
}
static int fails(int kind) {
    if (!(kind & kinds)) return 0;
    int number = __sync_add_and_fetch(&count, 1);
    if (!at || (once ? number != at : number < at)) return 0;
    if (error == -1) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}
#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define OF(fd) ((fd) >= 0 && (fd) < FILES && below[fd])

static int opened(int fd, int is_below) { if (fd >= 0 && fd < FILES) below[fd] = is_below; return fd; }
static int refuses(int is_below, int folder, const char *path, int flags) {
    if (!is_below || !(flags & (O_WRONLY | O_RDWR | O_CREAT))) return 0;
    struct stat found;
    int there = !fstatat(folder, path, &found, 0);
    return (there && error != EROFS && error != -1) ? 0 : fails(MAKE);
}
#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                \
        REAL(int, name, const char *, int, ...);                                                \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);        \
        int is_below = inside(AT_FDCWD, path);                                                  \
        return refuses(is_below, AT_FDCWD, path, flags) ? -1 : opened(real(path, flags, mode), is_below); \
    }
#define OPENAT(name)                                                                            \
    int name(int folder, const char *path, int flags, ...) {                                    \
        REAL(int, name, int, const char *, int, ...);                                           \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);        \
        int is_below = inside(folder, path);                                                    \
        return refuses(is_below, folder, path, flags) ? -1 : opened(real(folder, path, flags, mode), is_below); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FOPEN(name)                                                                             \
    FILE *name(const char *path, const char *mode) {                                            \
        REAL(FILE *, name, const char *, const char *);                                         \
        return inside(AT_FDCWD, path) && mode[0] != 'r' && fails(MAKE) ? NULL : real(path, mode); \
    }
FOPEN(fopen) FOPEN(fopen64)

int close(int fd) { REAL(int, close, int); opened(fd, 0); return real(fd); }

#define ON_FILE(type, name, kind, passed, ...)                                                  \
    type name(int fd, __VA_ARGS__) { REAL(type, name, int, __VA_ARGS__); return OF(fd) && fails(kind) ? -1 : real passed; }
ON_FILE(ssize_t, write, WRITE, (fd, b, n), const void *b, size_t n)
ON_FILE(ssize_t, pwrite, WRITE, (fd, b, n, o), const void *b, size_t n, off_t o)
ON_FILE(ssize_t, pwrite64, WRITE, (fd, b, n, o), const void *b, size_t n, off64_t o)
ON_FILE(ssize_t, writev, WRITE, (fd, v, n), const struct iovec *v, int n)
ON_FILE(ssize_t, pwritev, WRITE, (fd, v, n, o), const struct iovec *v, int n, off_t o)
ON_FILE(ssize_t, pwritev64, WRITE, (fd, v, n, o), const struct iovec *v, int n, off64_t o)
ON_FILE(ssize_t, sendfile, WRITE, (fd, in, o, n), int in, off_t *o, size_t n)
ON_FILE(ssize_t, sendfile64, WRITE, (fd, in, o, n), int in, off64_t *o, size_t n)
int fsync(int fd) { REAL(int, fsync, int); return OF(fd) && fails(SYNC) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(int, fdatasync, int); return OF(fd) && fails(SYNC) ? -1 : real(fd); }
ssize_t copy_file_range(int in, off64_t *p, int fd, off64_t *o, size_t n, unsigned f) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    return OF(fd) && fails(WRITE) ? -1 : real(in, p, fd, o, n, f);
}

#define ON_NAME(name, kind, folder, path, passed, ...)                                          \
    int name(__VA_ARGS__) { REAL(int, name, __VA_ARGS__); return inside(folder, path) && fails(kind) ? -1 : real passed; }
ON_NAME(mkdir, MAKE, AT_FDCWD, a, (a, m), const char *a, mode_t m)
ON_NAME(mkdirat, MAKE, d, a, (d, a, m), int d, const char *a, mode_t m)
ON_NAME(rename, NAME, AT_FDCWD, b, (a, b), const char *a, const char *b)
ON_NAME(renameat, NAME, e, b, (d, a, e, b), int d, const char *a, int e, const char *b)
ON_NAME(renameat2, NAME, e, b, (d, a, e, b, f), int d, const char *a, int e, const char *b, unsigned f)
ON_NAME(unlink, NAME, AT_FDCWD, a, (a), const char *a)
ON_NAME(unlinkat, NAME, d, a, (d, a, f), int d, const char *a, int f)
ON_NAME(rmdir, NAME, AT_FDCWD, a, (a), const char *a)
ON_NAME(link, NAME, AT_FDCWD, b, (a, b), const char *a, const char *b)
