/* What a process writes below one folder, as a log: preload this, then record_start, record_stop.
 *
 * A record: uint32 operation, bytes of path, bytes of other; uint64 inode, offset, size; then path,
 * other, and for WRITE `size` bytes of data. All little-endian as the machine is. Only calls that
 * succeeded are there, in the order in which they took effect: each holds the lock over call and
 * record. Flushes are recorded, not done: nobody pulls a plug, the log is replayed.
 *
 * Calls within the C library (fopen, fwrite) do not pass here: whoever replays a log holds its end
 * against the folder.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, TRUNCATE, WRITE, RENAME, LINK, SYMLINK, REMOVE, MKDIR, SYNC, SYNC_ALL };

static char root[4096];
static size_t root_length;
static int log_descriptor = -1;
static char last[256]; /* at the rename or link to a name that ends so, this process dies */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;


/* Records what happens below `folder` (a real path); `last_name`: where to die, empty: nowhere. */
int record_start(const char *folder, const char *log, const char *last_name) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    snprintf(last, sizeof last, "%s", last_name);
    log_descriptor = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    return log_descriptor;
}

void record_stop(void) {
    syscall(SYS_close, log_descriptor);
    log_descriptor = -1;
}

static int is_below(const char *path) {
    return log_descriptor >= 0 && !strncmp(path, root, root_length) &&
           (path[root_length] == '/' || !path[root_length]);
}

/* The path an open descriptor has now. */
static int path_of(int descriptor, char *path) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, path, 4095);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int is_recorded(int descriptor, char *path) {
    return log_descriptor >= 0 && path_of(descriptor, path) && is_below(path);
}

static void absolute(int folder, const char *path, char *result) {
    char prefix[4096] = "";
    if (path[0] != '/') {
        if (folder != AT_FDCWD) path_of(folder, prefix);
        else if (!getcwd(prefix, sizeof prefix)) prefix[0] = 0;
    }
    snprintf(result, 8192, "%s%s%s", prefix, path[0] == '/' ? "" : "/", path);
}

static void put(int operation, const char *path, const char *other, uint64_t inode, uint64_t offset,
                const struct iovec *data, int count, uint64_t size) {
    uint32_t head[3] = {operation, strlen(path), strlen(other)};
    uint64_t numbers[3] = {inode, offset, size};
    struct iovec parts[4] = {{head, sizeof head}, {numbers, sizeof numbers},
                             {(char *)path, head[1]}, {(char *)other, head[2]}};
    int saved = errno;
    syscall(SYS_writev, log_descriptor, parts, 4);
    for (int i = 0; i < count && size; i++) {
        size_t n = data[i].iov_len < size ? data[i].iov_len : size;
        syscall(SYS_write, log_descriptor, data[i].iov_base, n);
        size -= n;
    }
    if (*last && (operation == RENAME || operation == LINK) && head[2] >= strlen(last) && !strcmp(other + head[2] - strlen(last), last))
        kill(getpid(), SIGKILL);
    errno = saved;
}

static uint64_t inode_of(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) ? 0 : status.st_ino;
}

/* Files that are made, emptied and written. */

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char absolute_path[8192];
    if (log_descriptor < 0 || !(flags & (O_CREAT | O_TRUNC)))
        return syscall(SYS_openat, folder, path, flags, mode);
    absolute(folder, path, absolute_path);
    if (!is_below(absolute_path)) return syscall(SYS_openat, folder, path, flags, mode);
    pthread_mutex_lock(&lock);
    int existed = !faccessat(AT_FDCWD, absolute_path, F_OK, AT_SYMLINK_NOFOLLOW);
    int descriptor = syscall(SYS_openat, folder, path, flags, mode);
    if (descriptor >= 0 && !existed)
        put(CREATE, absolute_path, "", inode_of(descriptor), 0, NULL, 0, 0);
    else if (descriptor >= 0 && flags & O_TRUNC)
        put(TRUNCATE, absolute_path, "", inode_of(descriptor), 0, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    return descriptor;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static ssize_t written(int descriptor, const struct iovec *data, int count, off_t offset) {
    if (offset < 0) return syscall(SYS_writev, descriptor, data, count);
    return syscall(SYS_pwritev, descriptor, data, count, offset, 0L);
}

static ssize_t recorded(int descriptor, const struct iovec *data, int count, off_t offset) {
    char path[4096];
    if (!is_recorded(descriptor, path)) return written(descriptor, data, count, offset);
    pthread_mutex_lock(&lock);
    ssize_t size = written(descriptor, data, count, offset);
    if (size > 0) {
        if (offset < 0) offset = lseek(descriptor, 0, SEEK_CUR) - size;
        put(WRITE, path, "", inode_of(descriptor), offset, data, count, size);
    }
    pthread_mutex_unlock(&lock);
    return size;
}

#define ONE {(void *)data, size}
ssize_t write(int descriptor, const void *data, size_t size) {
    struct iovec one = ONE;
    if (log_descriptor < 0) return syscall(SYS_write, descriptor, data, size);
    return recorded(descriptor, &one, 1, -1);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    struct iovec one = ONE;
    return recorded(descriptor, &one, 1, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t offset) {
    struct iovec one = ONE;
    return recorded(descriptor, &one, 1, offset);
}
ssize_t writev(int descriptor, const struct iovec *data, int count) {
    return recorded(descriptor, data, count, -1);
}
ssize_t pwritev(int descriptor, const struct iovec *data, int count, off_t offset) {
    return recorded(descriptor, data, count, offset);
}
ssize_t pwritev64(int descriptor, const struct iovec *data, int count, off_t offset) {
    return recorded(descriptor, data, count, offset);
}

static int cut(int descriptor, off_t size) {
    char path[4096];
    if (!is_recorded(descriptor, path)) return syscall(SYS_ftruncate, descriptor, size);
    pthread_mutex_lock(&lock);
    int status = syscall(SYS_ftruncate, descriptor, size);
    if (!status) put(TRUNCATE, path, "", inode_of(descriptor), size, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    return status;
}
int ftruncate(int descriptor, off_t size) { return cut(descriptor, size); }
int ftruncate64(int descriptor, off_t size) { return cut(descriptor, size); }

/* Copies within the kernel have no data to record: callers take the plain way. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    char path[4096];
    if (is_recorded(out, path)) { errno = EINVAL; return -1; }
    return syscall(SYS_sendfile, out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t size) { return sendfile(out, in, offset, size); }
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    char path[4096];
    if (is_recorded(out, path)) { errno = EXDEV; return -1; }
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

/* Names. */

#define NAMED(operation, path, other, call) \
    pthread_mutex_lock(&lock); \
    int status = call; \
    if (!status) put(operation, path, other, inode, 0, NULL, 0, 0); \
    pthread_mutex_unlock(&lock); \
    return status

static int moved(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char a[8192], b[8192];
    uint64_t inode = flags;
    absolute(from_folder, from, a);
    absolute(to_folder, to, b);
    if (!is_below(a) && !is_below(b)) return syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    NAMED(RENAME, a, b, syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}
int rename(const char *from, const char *to) { return moved(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return moved(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return moved(a, from, b, to, flags);
}

static int linked(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char a[8192], b[8192];
    uint64_t inode = 0;
    absolute(from_folder, from, a);
    absolute(to_folder, to, b);
    if (!is_below(b)) return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
    NAMED(LINK, a, b, syscall(SYS_linkat, from_folder, from, to_folder, to, flags));
}
int link(const char *from, const char *to) { return linked(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char *from, int b, const char *to, int flags) { return linked(a, from, b, to, flags); }

int symlinkat(const char *target, int folder, const char *path) {
    char a[8192];
    uint64_t inode = 0;
    absolute(folder, path, a);
    if (!is_below(a)) return syscall(SYS_symlinkat, target, folder, path);
    NAMED(SYMLINK, a, target, syscall(SYS_symlinkat, target, folder, path));
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int unlinkat(int folder, const char *path, int flags) {
    char a[8192];
    uint64_t inode = 0;
    absolute(folder, path, a);
    if (!is_below(a)) return syscall(SYS_unlinkat, folder, path, flags);
    NAMED(REMOVE, a, "", syscall(SYS_unlinkat, folder, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    char a[8192];
    struct stat made;
    absolute(folder, path, a);
    if (!is_below(a)) return syscall(SYS_mkdirat, folder, path, mode);
    pthread_mutex_lock(&lock);
    int status = syscall(SYS_mkdirat, folder, path, mode);
    if (!status && !stat(a, &made)) put(MKDIR, a, "", made.st_ino, 0, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    return status;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Flushes. */

static int flushed(int operation, int descriptor, long number) {
    char path[4096];
    if (log_descriptor < 0 || !path_of(descriptor, path) || !is_below(path))
        return syscall(number, descriptor);
    pthread_mutex_lock(&lock);
    put(operation, path, "", inode_of(descriptor), 0, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    return 0;
}
int fsync(int descriptor) { return flushed(SYNC, descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return flushed(SYNC, descriptor, SYS_fdatasync); }
int syncfs(int descriptor) { return flushed(SYNC_ALL, descriptor, SYS_syncfs); }
