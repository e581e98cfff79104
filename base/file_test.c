#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/fault.h"
#include "base/file.h"

static char work_path[] = "/tmp/vmcp-file-test-XXXXXX";
static int work;

static void make_work(void)
{
	unsetenv("VMCP_FAULT");
	fault_init(NULL);
	cr_assert_not_null(mkdtemp(work_path));
	work = open(work_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	cr_assert_geq(work, 0);
}

static void remove_work(void)
{
	close(work);
	cr_assert_eq(file_remove_tree(AT_FDCWD, work_path, NULL), 0);
	cr_assert_eq(access(work_path, F_OK), -1);
}

TestSuite(file, .init = make_work, .fini = remove_work);

static void put(const char *name, const char *text)
{
	int fd = openat(work, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	cr_assert_geq(fd, 0);
	cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
	close(fd);
}

static void expect_content(const char *name, const char *text)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	cr_assert_eq(file_read_all(work, name, 1 << 20, &buf, NULL), 0);
	cr_assert_str_eq((char *)buf.data, text);
	cr_assert_eq(buf.length, strlen(text));
}

static unsigned count_temporaries(void)
{
	unsigned count = 0;
	DIR *dir = fdopendir(openat(work, ".", O_RDONLY | O_DIRECTORY));
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
		count += strncmp(entry->d_name, FILE_TEMP_PREFIX, strlen(FILE_TEMP_PREFIX)) == 0;
	closedir(dir);
	return count;
}

Test(file, pread_and_pwrite_are_whole_or_fail)
{
	struct err err = ERR_INIT;
	char data[8] = "";
	CLEANUP_CLOSE int fd = openat(work, "f", O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	cr_assert_eq(file_pwrite_full(fd, "abcdef", 6, 10, NULL), 0);
	cr_assert_eq(file_pread_full(fd, data, 6, 10, NULL), 0);
	cr_assert_str_eq(data, "abcdef");
	cr_assert_eq(file_pread_full(fd, data, 7, 10, &err), -ENODATA);
	cr_assert_eq(err.number, ENODATA);
	cr_assert_eq(file_pread_full(fd, data, 0, 999, NULL), 0);
	cr_assert_eq(file_pread_full(fd, data, 1, UINT64_MAX, NULL), -EOVERFLOW);
	cr_assert_eq(file_pwrite_full(fd, data, 1, INT64_MAX, NULL), -EOVERFLOW);
	cr_assert_eq(file_pwrite_full(-1, data, 1, 0, &err), -EBADF);
}

Test(file, tells_holes_from_data)
{
	CLEANUP_CLOSE int fd = open(".", O_TMPFILE | O_RDWR, 0600);
	uint64_t end;

	cr_assert_geq(fd, 0);
	cr_expect(file_is_hole(fd, 0, &end) && end == UINT64_MAX, "an empty file");
	cr_assert_eq(ftruncate(fd, 3 << 20), 0);
	cr_assert_eq(file_pwrite_full(fd, "x", 1, 1 << 20, NULL), 0);
	cr_expect(file_is_hole(fd, 5, &end) && end == 1 << 20);
	cr_expect(!file_is_hole(fd, (1 << 20) + 1, &end) && end > (1 << 20) + 1 && end < 3 << 20);
	cr_expect(file_is_hole(fd, end, &end) && end == UINT64_MAX, "none behind it");
	int ends[2];
	cr_assert_eq(pipe(ends), 0);
	cr_expect(!file_is_hole(ends[0], 0, &end) && end == UINT64_MAX, "what cannot be asked");
	close(ends[0]);
	close(ends[1]);
}

Test(file, read_all_keeps_to_the_limit)
{
	struct err err = ERR_INIT;
	struct buf buf = BUF_INIT;

	put("f", "12345");
	cr_assert_eq(file_read_all(work, "f", 5, &buf, NULL), 0);
	cr_assert_eq(buf.length, 5);
	cr_assert_eq(buf.data[5], 0);
	buf_free(&buf);
	cr_assert_eq(file_read_all(work, "f", 4, &buf, &err), -EFBIG);
	cr_assert_eq(err.class, ERR_DAMAGED);
	cr_assert_null(buf.data);
	cr_assert_eq(file_read_all(work, "none", 4, &buf, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	put("empty", "");
	cr_assert_eq(file_read_all(work, "empty", 0, &buf, NULL), 0);
	cr_assert_eq(buf.length, 0);
	cr_assert_eq(buf.data[0], 0);
	buf_free(&buf);
}

/* Files whose st_size says nothing. */
Test(file, read_all_of_proc)
{
	CLEANUP_BUF struct buf buf = BUF_INIT;
	struct buf none = BUF_INIT;

	cr_assert_eq(file_read_all(AT_FDCWD, "/proc/self/smaps", 16 << 20, &buf, NULL), 0);
	cr_assert_gt(buf.length, 4096);
	cr_assert_eq(strlen((char *)buf.data), buf.length);
	cr_assert_eq(file_read_all(AT_FDCWD, "/proc/self/smaps", 1000, &none, NULL), -EFBIG);
	cr_assert_null(none.data);
}

Test(file, read_all_refuses_what_would_not_end, .timeout = 10)
{
	struct buf buf = BUF_INIT;

	cr_assert_eq(mkfifoat(work, "fifo", 0600), 0);
	cr_assert_eq(file_read_all(work, "fifo", 100, &buf, NULL), -EINVAL);
	cr_assert_eq(file_read_all(AT_FDCWD, "/dev/zero", 100, &buf, NULL), -EINVAL);
	cr_assert_eq(file_read_all(work, ".", 100, &buf, NULL), -EISDIR);
}

Test(file, write_atomic_replaces)
{
	struct stat st;

	cr_assert_eq(file_write_atomic(work, "f", "one", 3, 0640, NULL), 0);
	expect_content("f", "one");
	cr_assert_eq(fstatat(work, "f", &st, 0), 0);
	cr_assert_eq(st.st_mode & 0777 & ~0640u, 0);
	cr_assert_eq(file_write_atomic(work, "f", "another", 7, 0640, NULL), 0);
	expect_content("f", "another");
	cr_assert_eq(file_write_atomic(work, "f", "", 0, 0640, NULL), 0);
	expect_content("f", "");
	cr_assert_eq(count_temporaries(), 0);
}

Test(file, write_atomic_refuses_paths)
{
	cr_assert_eq(file_write_atomic(work, "a/b", "x", 1, 0600, NULL), -EINVAL);
	cr_assert_eq(file_write_atomic(work, "", "x", 1, 0600, NULL), -EINVAL);
}

Test(file, write_atomic_onto_a_folder_fails_and_tidies_up)
{
	struct err err = ERR_INIT;

	cr_assert_eq(mkdirat(work, "d", 0700), 0);
	cr_assert_eq(file_write_atomic(work, "d", "x", 1, 0600, &err), -EISDIR);
	cr_assert_not_null(strstr(err.message, "writing d"));
	cr_assert_eq(count_temporaries(), 0);
}

Test(file, write_atomic_in_the_current_folder)
{
	cr_assert_eq(fchdir(work), 0);
	cr_assert_eq(file_write_atomic(AT_FDCWD, "f", "here", 4, 0600, NULL), 0);
	expect_content("f", "here");
	cr_assert_eq(chdir("/"), 0);
}

/* Runs one write of "new" over "old" with VMCP_FAULT=plan in a child. Returns the wait status; exit status 0: it
 * succeeded, 1: -EIO. */
static int write_with_fault(const char *plan)
{
	int status;

	put("f", "old");
	pid_t pid = fork();
	if (pid == 0) {
		setenv("VMCP_FAULT", plan, 1);
		if (fault_init(NULL) != 0)
			_exit(77);
		int ret = file_write_atomic(work, "f", "new content", 11, 0600, NULL);
		_exit(ret == 0 ? 0 : ret == -EIO ? 1 : 78);
	}
	cr_assert_eq(waitpid(pid, &status, 0), pid);
	return status;
}

Test(file, killed_at_each_point_leaves_old_or_new_whole)
{
	static const struct {
		const char *plan;
		const char *content;
		unsigned temporaries;
	} cases[] = {{"1", "old", 1}, {"2", "old", 1}, {"3", "new content", 0}};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		unsigned before = count_temporaries();
		int status = write_with_fault(cases[i].plan);
		cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "point %s was not passed", cases[i].plan);
		expect_content("f", cases[i].content);
		cr_assert_eq(count_temporaries() - before, cases[i].temporaries);
		/* What the dead process left does not hinder the next. */
		cr_assert_eq(file_write_atomic(work, "f", "after", 5, 0600, NULL), 0);
		expect_content("f", "after");
	}
}

Test(file, an_error_before_the_rename_has_no_effect)
{
	static const struct {
		const char *plan;
		const char *content;
	} cases[] = {{"1:eio", "old"}, {"2:eio", "old"}, {"3:eio", "new content"}};

	for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
		int status = write_with_fault(cases[i].plan);
		cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 1, "%s: status %x", cases[i].plan, status);
		expect_content("f", cases[i].content);
		cr_assert_eq(count_temporaries(), 0);
	}
}

/* kill -9 at any moment, not only at the points. */
Test(file, killed_anywhere_leaves_one_of_the_two_whole, .timeout = 60)
{
	static char contents[2][50001];

	memset(contents[0], 'a', 50000);
	memset(contents[1], 'b', 50000);
	cr_assert_eq(file_write_atomic(work, "f", contents[0], 50000, 0600, NULL), 0);
	for (int round = 0; round < 60; round++) {
		pid_t pid = fork();
		if (pid == 0) {
			for (int i = 0;; i++)
				file_write_atomic(work, "f", contents[i % 2], 50000, 0600, NULL);
		}
		usleep((useconds_t)(200 + 97 * round));
		kill(pid, SIGKILL);
		cr_assert_eq(waitpid(pid, NULL, 0), pid);
		CLEANUP_BUF struct buf buf = BUF_INIT;
		cr_assert_eq(file_read_all(work, "f", 1 << 20, &buf, NULL), 0);
		cr_assert_eq(buf.length, 50000);
		cr_assert_eq(memcmp(buf.data, contents[buf.data[0] == 'b'], 50000), 0, "round %d: torn", round);
	}
}

Test(file, open_dir_makes_parents)
{
	struct err err = ERR_INIT;
	struct stat st;

	cr_assert_eq(file_open_dir(work, "a/b/c", 0, &err), -ENOENT);
	cr_assert_eq(err.class, ERR_NOT_FOUND);
	CLEANUP_CLOSE int fd = file_open_dir(work, "a//b/c/", 1, &err);
	cr_assert_geq(fd, 0, "%s", err.message);
	cr_assert_eq(fstatat(work, "a/b/c", &st, 0), 0);
	cr_assert_eq(st.st_mode & 0077, 0);
	CLEANUP_CLOSE int again = file_open_dir(work, "a/b/c", 1, NULL);
	cr_assert_geq(again, 0);
	CLEANUP_FREE char *absolute = xasprintf("%s/x/y", work_path);
	CLEANUP_CLOSE int third = file_open_dir(AT_FDCWD, absolute, 1, NULL);
	cr_assert_geq(third, 0);
	put("plain", "");
	cr_assert_eq(file_open_dir(work, "plain", 1, NULL), -ENOTDIR);
	cr_assert_eq(file_open_dir(work, "plain/x", 1, NULL), -ENOTDIR);
	cr_assert_eq(file_open_dir(work, "", 1, NULL), -ENOENT);
}

Test(file, remove_tree_takes_all_and_follows_nothing)
{
	CLEANUP_CLOSE int deep = file_open_dir(work, "t/a/b/c/d", 1, NULL);
	cr_assert_geq(deep, 0);
	cr_assert_eq(mkdirat(work, "outside", 0700), 0);
	put("outside/keep", "kept");
	put("t/a/file", "x");
	CLEANUP_FREE char *target = xasprintf("%s/outside", work_path);
	cr_assert_eq(symlinkat(target, work, "t/a/link"), 0);
	cr_assert_eq(symlinkat(target, work, "link"), 0);
	for (int i = 0; i < 300; i++) {
		CLEANUP_FREE char *name = xasprintf("t/a/b/n%d", i);
		put(name, "");
	}
	cr_assert_eq(file_remove_tree(work, "t", NULL), 0);
	cr_assert_eq(faccessat(work, "t", F_OK, 0), -1);
	cr_assert_eq(file_remove_tree(work, "t", NULL), 0);
	cr_assert_eq(file_remove_tree(work, "link", NULL), 0);
	expect_content("outside/keep", "kept");
}

Test(file, remove_tree_ends_at_a_hostile_depth)
{
	struct err err = ERR_INIT;
	char path[601];

	for (int i = 0; i < 100; i++)
		memcpy(path + 2 * i, "d/", 3);
	CLEANUP_CLOSE int deep = file_open_dir(work, path, 1, NULL);
	cr_assert_geq(deep, 0);
	cr_assert_eq(file_remove_tree(work, "d", &err), -ELOOP);
	/* Tidy up by halves. */
	path[100] = '\0';
	cr_assert_eq(file_remove_tree(work, path, NULL), 0);
}
