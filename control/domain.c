#include "control/domain.h"

#include "machine/domain.h"

int control_domain_convert(const char *connect, const char *source, struct buf *text, struct err *err)
{
	bool active;

	if (connect)
		return domain_fetch_to_text(connect, source, text, &active, err);
	return domain_file_to_text(source, "", text, err);
}

/* The VM's own layers over shared bases, as the machine places them. */
static void place_disks(struct store *store, struct machine_config *config)
{
	for (unsigned i = 0; i < config->disk_count; i++)
		if (!config->disks[i].path)
			config->disks[i].path = xasprintf("%s/vms/%s/%s.qcow2", store_path(store), config->name, config->disks[i].name);
}

int control_domain_export(struct store *store, const char *vm, struct buf *xml, struct err *err)
{
	struct machine_config config;
	struct store_vm record;
	int rc = store_vm_get(store, vm, &record, err);

	if (rc)
		return rc;
	rc = config_read_text(vm, record.config_text, &config, err);
	if (!rc) {
		place_disks(store, &config);
		rc = domain_write(&config, record.uuid, xml, err);
		config_free(&config);
	}
	store_vm_free(&record);
	return rc;
}
