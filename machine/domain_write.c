/* The configuration as domain XML: what QEMU below libvirt shows its guest as vmcp does. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "machine/config_internal.h"
#include "machine/domain.h"

/* malloc. */
static char *escape(const char *text)
{
	char *out = xcalloc(strlen(text) + 1, 6), *to = out;

	for (; *text; text++) {
		const char *entity = *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : *text == '>' ? "&gt;" : *text == '\'' ? "&apos;" : NULL;

		if (entity)
			to = stpcpy(to, entity);
		else
			*to++ = *text;
	}
	return out;
}

/* `format` with one %s, for the escaped text. */
#define PUT_TEXT(rc, out, err, format, text)                                                                                                \
	do {                                                                                                                                \
		CLEANUP_FREE char *escaped = escape(text);                                                                                  \
		if (!(rc))                                                                                                                  \
			(rc) = config_append(out, err, format, escaped);                                                                    \
	} while (0)

/* QEMU has no models of the levels' names: the oldest that has all of a level. */
static int write_cpu(const struct machine_config *config, struct buf *out, struct err *err)
{
	const char *model = !strcmp(config->cpu_model, "x86-64-v1")   ? "qemu64"
			    : !strcmp(config->cpu_model, "x86-64-v2") ? "Nehalem"
			    : !strcmp(config->cpu_model, "x86-64-v3") ? "Haswell-noTSX"
								      : NULL;

	if (!model)
		return config_append(out, err, "  <cpu mode='host-passthrough'/>\n");
	return config_append(out, err, "  <cpu mode='custom' match='exact'>\n    <model fallback='allow'>%s</model>\n  </cpu>\n", model);
}

static int write_machine(const struct machine_config *config, const char *uuid, struct buf *out, struct err *err)
{
	int rc = config_append(out, err, "<domain type='kvm'>\n  <name>%s</name>\n", config->name);

	if (!rc && *uuid)
		rc = config_append(out, err, "  <uuid>%s</uuid>\n", uuid);
	if (!rc)
		rc = config_append(out, err, "  <memory unit='KiB'>%llu</memory>\n  <vcpu>%u</vcpu>\n", (unsigned long long)config->memory_bytes >> 10,
				   config->cpus);
	if (!rc && config->memory_backing == MEM_BACKING_HUGETLB)
		rc = config_append(out, err, "  <memoryBacking>\n    <hugepages/>\n  </memoryBacking>\n");
	if (!rc)
		rc = config_append(out, err, "  <os>\n    <type arch='x86_64' machine='pc'>hvm</type>\n");
	if (config->kernel)
		PUT_TEXT(rc, out, err, "    <kernel>%s</kernel>\n", config->kernel);
	if (config->initrd)
		PUT_TEXT(rc, out, err, "    <initrd>%s</initrd>\n", config->initrd);
	if (config->cmdline[0])
		PUT_TEXT(rc, out, err, "    <cmdline>%s</cmdline>\n", config->cmdline);
	if (!rc)
		rc = config_append(out, err, "  </os>\n  <features>\n    <acpi/>\n    <apic/>\n  </features>\n");
	if (!rc)
		rc = write_cpu(config, out, err);
	if (!rc)
		rc = config_append(out, err, "  <clock offset='utc'/>\n  <on_poweroff>destroy</on_poweroff>\n  <on_reboot>restart</on_reboot>\n"
					     "  <on_crash>destroy</on_crash>\n");
	return rc;
}

static int write_disk(const struct config_disk *disk, unsigned index, struct buf *out, struct err *err)
{
	bool qcow2;
	int rc = domain_image_is_qcow2(disk->path, &qcow2, err);

	if (rc)
		return err_prefix(err, "disk %s", disk->name);
	rc = config_append(out, err, "    <disk type='file' device='disk'>\n      <driver name='qemu' type='%s'/>\n", qcow2 ? "qcow2" : "raw");
	PUT_TEXT(rc, out, err, "      <source file='%s'/>\n", disk->path);
	if (!rc)
		rc = config_append(out, err, "      <target dev='vd%c' bus='virtio'/>\n%s      <serial>%.20s</serial>\n    </disk>\n", 'a' + (int)index,
				   disk->readonly ? "      <readonly/>\n" : "", disk->name);
	return rc;
}

static int write_rates(const struct config_net *net, struct buf *out, struct err *err)
{
	int rc = 0;

	if (!net->send_rate && !net->receive_rate)
		return 0;
	rc = config_append(out, err, "      <bandwidth>\n");
	if (!rc && net->receive_rate)
		rc = config_append(out, err, "        <inbound average='%llu'/>\n", (unsigned long long)(net->receive_rate + 999) / 1000);
	if (!rc && net->send_rate)
		rc = config_append(out, err, "        <outbound average='%llu'/>\n", (unsigned long long)(net->send_rate + 999) / 1000);
	return rc ? rc : config_append(out, err, "      </bandwidth>\n");
}

static int write_net(const char *vm, const struct config_net *net, struct buf *out, struct err *err)
{
	static const char *const types[] = {[NET_USER] = "user", [NET_TAP] = "ethernet", [NET_BRIDGE] = "bridge", [NET_LIBVIRT] = "network"};
	const uint8_t *m = net->mac;
	if (net->mode == NET_GROUP) {
		err_set(err, ERR_USAGE, ENOTSUP, "[net %s]: a domain of libvirt has nothing like mode = group", net->name);
		return err_hint(err, "give the card another mode");
	}
	int rc = config_append(out, err, "    <interface type='%s'>\n", types[net->mode]);

	if (!rc && net->mac_given)
		rc = config_append(out, err, "      <mac address='%02x:%02x:%02x:%02x:%02x:%02x'/>\n", m[0], m[1], m[2], m[3], m[4], m[5]);
	if (net->mode == NET_BRIDGE)
		PUT_TEXT(rc, out, err, "      <source bridge='%s'/>\n", net->bridge);
	if (net->mode == NET_LIBVIRT)
		PUT_TEXT(rc, out, err, "      <source network='%s'/>\n", net->network);
	if (net->mode == NET_TAP)
		PUT_TEXT(rc, out, err, "      <target dev='%s' managed='no'/>\n", net->tap);
	if (!rc)
		rc = config_append(out, err, "      <model type='virtio'/>\n");
	if (!rc && net->queues > 1 && net->mode != NET_USER)
		rc = config_append(out, err, "      <driver queues='%u'/>\n", net->queues);
	if (net->queues > 1 && net->mode == NET_USER)
		log_warn("%s: net %s: its queues are not in the domain: QEMU's user network has one", vm, net->name);
	if (net->forward_count)
		log_warn("%s: net %s: its forwarded ports are not in the domain: QEMU below libvirt needs passt for them", vm, net->name);
	if (!rc)
		rc = write_rates(net, out, err);
	return rc ? rc : config_append(out, err, "    </interface>\n");
}

static int write_devices(const struct machine_config *config, struct buf *out, struct err *err)
{
	int rc = config_append(out, err, "  <devices>\n");

	for (unsigned i = 0; !rc && i < config->disk_count; i++)
		rc = write_disk(&config->disks[i], i, out, err);
	for (unsigned i = 0; !rc && i < config->net_count; i++)
		if (config->nets[i].mode != NET_NONE)
			rc = write_net(config->name, &config->nets[i], out, err);
	if (!rc)
		rc = config_append(out, err, "    <serial type='pty'>\n      <target port='0'/>\n    </serial>\n"
					     "    <console type='pty'>\n      <target type='serial' port='0'/>\n    </console>\n");
	if (!rc && config->rng)
		rc = config_append(out, err, "    <rng model='virtio'>\n      <backend model='random'>/dev/urandom</backend>\n    </rng>\n");
	if (!rc && config->vsock_cid)
		rc = config_append(out, err, "    <vsock model='virtio'>\n      <cid auto='no' address='%u'/>\n    </vsock>\n", config->vsock_cid);
	if (!rc)
		rc = config_append(out, err, "    <memballoon model='%s'/>\n  </devices>\n</domain>\n", config->balloon ? "virtio" : "none");
	return rc;
}

int domain_write(const struct machine_config *config, const char *uuid, struct buf *xml, struct err *err)
{
	int rc = write_machine(config, uuid, xml, err);

	if (config->every_ns)
		log_warn("%s: its periodic checkpoints are not in the domain", config->name);
	return rc ? rc : write_devices(config, xml, err);
}
