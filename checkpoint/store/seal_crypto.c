#include "checkpoint/store/seal_crypto.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include "base/library.h"

#define MOST_LOG_N 20u
#define MOST_R	   8u
#define MOST_P	   4u

#define FUNCTIONS(X)                                                                                                                         \
	X(EVP_CIPHER_CTX_new)                                                                                                                \
	X(EVP_CIPHER_CTX_free)                                                                                                               \
	X(EVP_CIPHER_CTX_ctrl)                                                                                                               \
	X(EVP_CipherInit_ex)                                                                                                                 \
	X(EVP_CipherUpdate)                                                                                                                  \
	X(EVP_CipherFinal_ex)                                                                                                                \
	X(EVP_PBE_scrypt)                                                                                                                    \
	X(EVP_aes_256_gcm)                                                                                                                   \
	X(EVP_aes_256_xts)                                                                                                                   \
	X(EVP_sha512)                                                                                                                        \
	X(HMAC)                                                                                                                              \
	X(RAND_bytes)
static struct {
	FUNCTIONS(LIBRARY_FIELD)
} lib;
static const struct library libcrypto = {"libcrypto.so.3", LIBRARY_NAMES(FUNCTIONS)};

static const char *load(void)
{
	return library_load(&libcrypto, &lib);
}

const char *seal_why_not(void)
{
	const char *why = load();

	return why ? why : "failed";
}

struct seal_crypto {
	EVP_CIPHER_CTX *context;
	uint8_t key[SEAL_KEY_BYTES];
};

struct seal_crypto *seal_crypto_new(void)
{
	struct seal_crypto *crypto = load() ? NULL : calloc(1, sizeof(*crypto));

	if (crypto && !(crypto->context = lib.EVP_CIPHER_CTX_new())) {
		free(crypto);
		return NULL;
	}
	return crypto;
}

void seal_crypto_free(struct seal_crypto *crypto)
{
	if (!crypto)
		return;
	lib.EVP_CIPHER_CTX_free(crypto->context);
	explicit_bzero(crypto->key, sizeof(crypto->key));
	free(crypto);
}

bool seal_random(void *data, size_t bytes) { return !load() && lib.RAND_bytes(data, (int)bytes) == 1; }

bool seal_may_derive(unsigned log_n, unsigned r, unsigned p)
{
	return log_n >= 1 && log_n <= MOST_LOG_N && r >= 1 && r <= MOST_R && p >= 1 && p <= MOST_P;
}

void seal_set_key(struct seal_crypto *crypto, const uint8_t key[SEAL_KEY_BYTES]) { memcpy(crypto->key, key, SEAL_KEY_BYTES); }

bool seal_derive(struct seal_crypto *crypto, const void *secret, size_t secret_bytes, const void *salt,
		 size_t salt_bytes, unsigned log_n, unsigned r, unsigned p)
{
	uint64_t memory = 128ull * r * ((1ull << log_n) + p) + (1u << 20);

	return lib.EVP_PBE_scrypt(secret, secret_bytes, salt, salt_bytes, 1ull << log_n, r, p, memory, crypto->key,
			      SEAL_KEY_BYTES) == 1;
}

/* All but the end. */
static bool begin(struct seal_crypto *crypto, const struct seal_message *m, bool encrypt)
{
	int n;

	return m->bytes <= INT_MAX && m->extra_bytes <= INT_MAX &&
	       lib.EVP_CipherInit_ex(crypto->context, lib.EVP_aes_256_gcm(), NULL, crypto->key, m->nonce, encrypt) == 1 &&
	       (!m->extra_bytes || lib.EVP_CipherUpdate(crypto->context, NULL, &n, m->extra, (int)m->extra_bytes) == 1) &&
	       (!m->bytes || lib.EVP_CipherUpdate(crypto->context, m->out, &n, m->in, (int)m->bytes) == 1);
}

bool seal_encrypt(struct seal_crypto *crypto, const struct seal_message *m)
{
	uint8_t rest[16];
	int n;

	return begin(crypto, m, true) && lib.EVP_CipherFinal_ex(crypto->context, rest, &n) == 1 &&
	       lib.EVP_CIPHER_CTX_ctrl(crypto->context, EVP_CTRL_GCM_GET_TAG, SEAL_TAG_BYTES, m->tag) == 1;
}

int seal_decrypt(struct seal_crypto *crypto, const struct seal_message *m)
{
	uint8_t rest[16];
	int n;

	if (!begin(crypto, m, false) ||
	    lib.EVP_CIPHER_CTX_ctrl(crypto->context, EVP_CTRL_GCM_SET_TAG, SEAL_TAG_BYTES, m->tag) != 1)
		return -1;
	return lib.EVP_CipherFinal_ex(crypto->context, rest, &n) == 1;
}

bool seal_hmac(const uint8_t key[SEAL_KEY_BYTES], const char *text, uint8_t out[SEAL_HMAC_BYTES])
{
	unsigned n;

	return !load() &&
	       lib.HMAC(lib.EVP_sha512(), key, SEAL_KEY_BYTES, (const unsigned char *)text, strlen(text), out, &n) &&
	       n == SEAL_HMAC_BYTES;
}

struct seal_pages {
	EVP_CIPHER_CTX *context;
};

/* The key is set up once, as that takes longer than a page. */
struct seal_pages *seal_pages_new(const uint8_t key[SEAL_PAGES_KEY_BYTES], bool encrypt)
{
	struct seal_pages *pages = load() ? NULL : calloc(1, sizeof(*pages));

	if (pages && (!(pages->context = lib.EVP_CIPHER_CTX_new()) ||
		      lib.EVP_CipherInit_ex(pages->context, lib.EVP_aes_256_xts(), NULL, key, NULL, encrypt) != 1)) {
		seal_pages_free(pages);
		return NULL;
	}
	return pages;
}

void seal_pages_free(struct seal_pages *pages)
{
	if (!pages)
		return;
	lib.EVP_CIPHER_CTX_free(pages->context);
	free(pages);
}

bool seal_page(struct seal_pages *pages, uint64_t number, void *data)
{
	uint8_t unit[16] = {0};
	int n;

	for (unsigned i = 0; i < sizeof(number); i++)
		unit[i] = (uint8_t)(number >> 8 * i);
	return lib.EVP_CipherInit_ex(pages->context, NULL, NULL, NULL, unit, -1) == 1 &&
	       lib.EVP_CipherUpdate(pages->context, data, &n, data, SEAL_PAGE_BYTES) == 1 && n == SEAL_PAGE_BYTES;
}
