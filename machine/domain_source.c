/* Where domains come from, files and libvirt, and the way from there to a configuration, whose images are looked at. */
#include "machine/domain.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/file.h"
#include "machine/config_internal.h"
#include "machine/domain_internal.h"
#include "machine/libvirt.h"

#define QCOW2_MAGIC 0x514649fbu

int domain_image_is_qcow2(const char *path, bool *is, struct err *err)
{
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC);
	uint8_t magic[4];

	if (fd < 0)
		return err_sys(err, errno, "%s", path);
	*is = pread(fd, magic, sizeof(magic), 0) == (ssize_t)sizeof(magic) && get_be32(magic) == QCOW2_MAGIC;
	return 0;
}

/* The images of disks, against what the domain says of them. */
static int check_formats(const struct domain_reading *r, const struct machine_config *config)
{
	for (unsigned i = 0; i < config->disk_count; i++) {
		const char *path = config->disks[i].path ? config->disks[i].path : config->disks[i].base;
		bool qcow2 = r->formats[i] == DOMAIN_QCOW2, is;

		if (domain_image_is_qcow2(path, &is, r->err))
			return err_prefix(r->err, "%s: disk %s", r->what, config->disks[i].name);
		if (is == qcow2)
			continue;
		err_set(r->err, ERR_USAGE, EINVAL, "%s: disk %s: %s is %s qcow2 image, but the domain says <driver type='%s'/>", r->what,
			config->disks[i].name, path, qcow2 ? "no" : "a", qcow2 ? "qcow2" : "raw");
		return err_hint(r->err, "set the type that the image has: `qemu-img info %s`", path);
	}
	return 0;
}

static int translate_and_read(struct domain_reading *r, const char *folder, const char *xml, size_t length, const char *connect, bool files,
			      struct buf *text, struct machine_config *out)
{
	int rc = domain_translate(r, xml, length, connect, text);

	if (!rc)
		rc = buf_append(text, NULL, 1, r->err);
	if (rc)
		return rc;
	text->length--;
	rc = config_read_made(r->what, folder, (const char *)text->data, files, out, r->err);
	if (!rc)
		memcpy(out->uuid, r->uuid, sizeof(out->uuid));
	if (rc || !files)
		return rc;
	rc = check_formats(r, out);
	if (rc)
		config_free(out);
	return rc;
}

int domain_to_text(const char *what, const char *xml, size_t length, const char *connect, struct buf *text, struct err *err)
{
	struct err local = ERR_INIT;
	struct domain_reading r = {.what = what, .lines = true, .err = err ? err : &local};
	struct machine_config config;
	int rc = translate_and_read(&r, "/", xml, length, connect, false, text, &config);

	if (!rc)
		config_free(&config);
	return rc;
}

/* --- from files --- */

bool domain_is_xml(const char *path)
{
	char start[64];
	CLEANUP_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	ssize_t n = fd < 0 ? -1 : pread(fd, start, sizeof(start), 0), i = 0;

	if (n >= 3 && !memcmp(start, "\xef\xbb\xbf", 3))
		i = 3;
	while (i < n && isspace((unsigned char)start[i]))
		i++;
	return i < n && start[i] == '<';
}

static int load_file(const char *path, struct buf *xml, struct err *err)
{
	int rc = file_read_all(AT_FDCWD, path, XML_MAX_BYTES, xml, err);

	return rc ? err_hint(err, "a readable file of domain XML is needed") : 0;
}

int domain_file_to_text(const char *path, const char *connect, struct buf *text, struct err *err)
{
	CLEANUP_BUF struct buf xml = BUF_INIT;
	int rc = load_file(path, &xml, err);

	return rc ? rc : domain_to_text(path, (const char *)xml.data, xml.length, connect, text, err);
}

int domain_read_file(const char *path, const char *connect, struct machine_config *out, struct err *err)
{
	struct err local = ERR_INIT;
	struct domain_reading r = {.what = path, .lines = true, .err = err ? err : &local};
	CLEANUP_BUF struct buf xml = BUF_INIT, text = BUF_INIT;
	int rc = load_file(path, &xml, r.err);

	*out = (struct machine_config){0};
	if (rc)
		return rc;
	char *absolute = realpath(path, NULL);
	if (!absolute)
		return err_sys(r.err, errno, "%s", path);
	CLEANUP_FREE char *folder = xstrdup(absolute);
	*strrchr(folder, '/') = '\0';
	rc = translate_and_read(&r, folder, (const char *)xml.data, xml.length, connect, true, &text, out);
	if (rc) {
		free(absolute);
		return rc;
	}
	free(out->source);
	out->source = absolute;
	return 0;
}

/* --- from libvirt --- */

static int fetch(const char *connect, const char *name, char **xml, bool *active, struct err *err)
{
	struct libvirt *libvirt;
	int rc = libvirt_open(connect, &libvirt, err);

	if (!rc)
		rc = libvirt_domain_xml(libvirt, name, xml, active, err);
	libvirt_close(libvirt);
	return rc;
}

int domain_fetch_to_text(const char *connect, const char *name, struct buf *text, bool *active, struct err *err)
{
	struct err local = ERR_INIT;
	struct domain_reading r = {.what = name, .err = err ? err : &local};
	struct machine_config config;
	CLEANUP_FREE char *xml = NULL;
	int rc = fetch(connect, name, &xml, active, r.err);

	if (!rc)
		rc = translate_and_read(&r, "/", xml, strlen(xml), connect, false, text, &config);
	if (!rc)
		config_free(&config);
	return rc;
}

int domain_fetch(const char *connect, const char *name, struct machine_config *out, struct err *err)
{
	struct err local = ERR_INIT;
	struct domain_reading r = {.what = name, .err = err ? err : &local};
	CLEANUP_BUF struct buf text = BUF_INIT;
	CLEANUP_FREE char *xml = NULL;
	bool active;
	int rc = fetch(connect, name, &xml, &active, r.err);

	*out = (struct machine_config){0};
	if (!rc && active) {
		err_set(r.err, ERR_STATE, EBUSY, "domain %s: libvirt runs it, with its disks", name);
		rc = err_hint(r.err, "shut it down first: `virsh shutdown %s`", name);
	}
	return rc ? rc : translate_and_read(&r, "/", xml, strlen(xml), connect, true, &text, out);
}
