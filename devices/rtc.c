#include "devices/rtc.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/bytes.h"
#include "base/log.h"
#include "vmm/memory.h"

#define PORTS	   2u
#define CMOS_BYTES 128u
#define INDEX_MASK 0x7f /* the top bit of port 0x70 masks NMIs, which nobody sends */

enum {
	REG_SECONDS = 0,
	REG_SECONDS_ALARM = 1,
	REG_MINUTES = 2,
	REG_MINUTES_ALARM = 3,
	REG_HOURS = 4,
	REG_HOURS_ALARM = 5,
	REG_WEEKDAY = 6, /* 1 is Sunday */
	REG_DAY = 7,
	REG_MONTH = 8,
	REG_YEAR = 9,
	REG_A = 10,
	REG_B = 11,
	REG_C = 12,
	REG_D = 13,
	REG_CENTURY = 0x32, /* as the FADT says */
};

#define A_UPDATING     0x80
#define A_DIVIDER_RATE 0x26 /* 32768 Hz crystal, 1024 Hz */
#define A_RATE_MASK    0x0f
#define A_KEPT	       0x7f

#define B_SET	     0x80
#define B_PERIODIC   0x40
#define B_ALARM	     0x20
#define B_UPDATE     0x10
#define B_INTERRUPTS (B_PERIODIC | B_ALARM | B_UPDATE)
#define B_BINARY     0x04
#define B_24_HOURS   0x02

#define C_INTERRUPT 0x80
#define C_PERIODIC  0x40 /* the same bits as their enables in register B */
#define C_ALARM	    0x20
#define C_UPDATE    0x10

#define D_VALID 0x80

#define ALARM_ANY   0xc0 /* an alarm byte with both bits set matches always */
#define HOURS_PM    0x80
#define SECOND_NS   1000000000ll
#define UPDATE_NS   244000 /* UIP is set so long before the seconds change */
#define CRYSTAL_HZ  32768
#define DAY_SECONDS 86400
/* The guest sets the clock within 146 years of 1970, and an offset is that less the host's time: all sums then fit 64
 * bits. */
#define TIME_LIMIT_NS	(INT64_MAX / 2)
#define OFFSET_LIMIT_NS (INT64_MAX / 4 * 3)

struct rtc_state {
	uint8_t index;
	uint8_t cmos[CMOS_BYTES]; /* the time registers count while B_SET is set; register C holds the flags */
	int64_t offset_ns;	  /* what the clock shows, less the host's UTC time */
	int64_t checked_ns;	  /* clock time up to which events are in the flags */
};

static const struct codec_field rtc_fields[] = {
	CODEC_INT(struct rtc_state, index, CODEC_U8),
	CODEC_RAW(struct rtc_state, cmos),
	CODEC_INT(struct rtc_state, offset_ns, CODEC_I64),
	CODEC_INT(struct rtc_state, checked_ns, CODEC_I64),
	CODEC_END,
};
static const struct codec_table rtc_table = {"rtc", sizeof(struct rtc_state), rtc_fields};

struct rtc {
	struct isa_platform platform; /* immutable */
	struct loop *loop;	      /* immutable */
	int timer_fd;		      /* immutable; -1 without a loop */
	struct loop_source *source;   /* immutable */
	pthread_mutex_t
		lock; /* a leaf but for the interrupt line, which is set under it so that levels come in order */
	struct rtc_state state; /* under lock */
};

/* --- what the registers mean, under lock --- */

/* Nanoseconds since 1970 as the clock shows them. */
static int64_t clock_ns(const struct rtc *rtc)
{
	return (int64_t)((uint64_t)rtc->state.offset_ns + rtc->platform.wall_ns(rtc->platform.opaque));
}

/* Division that rounds down, for times before 1970. */
static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

static uint8_t encode(const struct rtc_state *s, unsigned value)
{
	return (uint8_t)(s->cmos[REG_B] & B_BINARY ? value : value / 10 % 10 << 4 | value % 10);
}

static unsigned decode(const struct rtc_state *s, uint8_t byte)
{
	return s->cmos[REG_B] & B_BINARY ? byte : (byte >> 4) * 10u + (byte & 0xf);
}

static uint8_t encode_hour(const struct rtc_state *s, unsigned hour)
{
	if (s->cmos[REG_B] & B_24_HOURS)
		return encode(s, hour);
	return encode(s, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? HOURS_PM : 0);
}

static unsigned decode_hour(const struct rtc_state *s, uint8_t byte)
{
	if (s->cmos[REG_B] & B_24_HOURS)
		return decode(s, byte);
	return decode(s, byte & (uint8_t)~HOURS_PM) % 12 + (byte & HOURS_PM ? 12 : 0);
}

/* Puts the present time into the time registers. */
static void latch_time(struct rtc *rtc)
{
	struct rtc_state *s = &rtc->state;
	time_t seconds = (time_t)floor_divide(clock_ns(rtc), SECOND_NS);
	struct tm t;

	if (!gmtime_r(&seconds, &t))
		return;
	unsigned year = (unsigned)t.tm_year + 1900;
	s->cmos[REG_SECONDS] = encode(s, (unsigned)t.tm_sec);
	s->cmos[REG_MINUTES] = encode(s, (unsigned)t.tm_min);
	s->cmos[REG_HOURS] = encode_hour(s, (unsigned)t.tm_hour);
	s->cmos[REG_WEEKDAY] = encode(s, (unsigned)t.tm_wday + 1);
	s->cmos[REG_DAY] = encode(s, (unsigned)t.tm_mday);
	s->cmos[REG_MONTH] = encode(s, (unsigned)t.tm_mon + 1);
	s->cmos[REG_YEAR] = encode(s, year % 100);
	s->cmos[REG_CENTURY] = encode(s, year / 100);
}

/* Makes the clock show what the time registers hold, `fraction_ns` into that second. */
static void set_time(struct rtc *rtc, int64_t fraction_ns)
{
	struct rtc_state *s = &rtc->state;
	struct tm t = {
		.tm_sec = (int)decode(s, s->cmos[REG_SECONDS]),
		.tm_min = (int)decode(s, s->cmos[REG_MINUTES]),
		.tm_hour = (int)decode_hour(s, s->cmos[REG_HOURS]),
		.tm_mday = (int)decode(s, s->cmos[REG_DAY]),
		.tm_mon = (int)decode(s, s->cmos[REG_MONTH]) - 1,
		.tm_year = (int)(decode(s, s->cmos[REG_CENTURY]) * 100 + decode(s, s->cmos[REG_YEAR])) - 1900,
	};
	/* Any bytes will do for timegm, which carries what is too much; a time that no clock shows is not taken. */
	int64_t seconds = (int64_t)timegm(&t), ns;

	if (__builtin_mul_overflow(seconds, SECOND_NS, &ns) || ns > TIME_LIMIT_NS || ns < -TIME_LIMIT_NS)
		return;
	s->offset_ns = (int64_t)((uint64_t)ns + (uint64_t)fraction_ns - rtc->platform.wall_ns(rtc->platform.opaque));
	s->checked_ns = ns + fraction_ns;
}

static bool is_time_register(unsigned reg)
{
	return reg == REG_SECONDS || reg == REG_MINUTES || reg == REG_HOURS ||
	       (reg >= REG_WEEKDAY && reg <= REG_YEAR) || reg == REG_CENTURY;
}

/* --- events, under lock --- */

/* The first second after `after` at which the alarm goes off, INT64_MAX if it never does (bytes that are no time). */
static int64_t next_alarm(const struct rtc_state *s, int64_t after)
{
	const uint8_t *c = s->cmos;
	bool any_second = c[REG_SECONDS_ALARM] >= ALARM_ANY, any_minute = c[REG_MINUTES_ALARM] >= ALARM_ANY;
	bool any_hour = c[REG_HOURS_ALARM] >= ALARM_ANY;
	int64_t second = decode(s, c[REG_SECONDS_ALARM]), minute = decode(s, c[REG_MINUTES_ALARM]);
	int64_t hour = decode_hour(s, c[REG_HOURS_ALARM]), t = after + 1;

	if ((!any_second && second > 59) || (!any_minute && minute > 59) || (!any_hour && hour > 23))
		return INT64_MAX;
	/* Skips hours, then minutes, then seconds that do not match: a day and a few steps at most. */
	for (;;) {
		int64_t of_day = t - floor_divide(t, DAY_SECONDS) * DAY_SECONDS;
		if (!any_hour && of_day / 3600 != hour)
			t += 3600 - of_day % 3600;
		else if (!any_minute && of_day / 60 % 60 != minute)
			t += 60 - of_day % 60;
		else if (!any_second && of_day % 60 != second)
			t++;
		else
			return t;
	}
}

/* Of the periodic interrupt (data sheet, table 5), 0 if off. */
static int64_t period_ns(const struct rtc_state *s)
{
	unsigned rate = s->cmos[REG_A] & A_RATE_MASK;

	if (rate == 0)
		return 0;
	if (rate <= 2) /* two odd ones: 256 and 128 Hz */
		rate += 7;
	return SECOND_NS * (1 << (rate - 1)) / CRYSTAL_HZ;
}

static void update_line(struct rtc *rtc)
{
	rtc->platform.irq_set(rtc->platform.opaque, RTC_GSI, rtc->state.cmos[REG_C] & C_INTERRUPT);
}

/* Brings the flags of register C up to the present. */
static void check_events(struct rtc *rtc)
{
	struct rtc_state *s = &rtc->state;
	int64_t now = clock_ns(rtc), from = s->checked_ns, period = period_ns(s);
	uint8_t flags = s->cmos[REG_C] & (uint8_t)~C_INTERRUPT;

	/* The host's clock may be set back: then nothing has happened. */
	if (now > from) {
		int64_t second = floor_divide(now, SECOND_NS), from_second = floor_divide(from, SECOND_NS);
		if (period && floor_divide(now, period) != floor_divide(from, period))
			flags |= C_PERIODIC;
		if (!(s->cmos[REG_B] & B_SET) && second != from_second) {
			flags |= C_UPDATE;
			if (next_alarm(s, from_second) <= second)
				flags |= C_ALARM;
		}
	}
	s->checked_ns = now;
	s->cmos[REG_C] = flags | (flags & s->cmos[REG_B] & B_INTERRUPTS ? C_INTERRUPT : 0);
	update_line(rtc);
}

/* Sets the timer to the next event whose interrupt is wanted. None comes before the guest has read the last one's
 * flags. */
static void arm_timer(struct rtc *rtc)
{
	struct rtc_state *s = &rtc->state;
	struct itimerspec when = {0}; /* all zero: off */
	uint8_t wanted = s->cmos[REG_B] & B_INTERRUPTS & (uint8_t)~s->cmos[REG_C];
	int64_t next = INT64_MAX, second = floor_divide(s->checked_ns, SECOND_NS), period = period_ns(s);

	if (rtc->timer_fd < 0)
		return;
	if (s->cmos[REG_B] & B_SET)
		wanted &= B_PERIODIC;
	if ((wanted & B_PERIODIC) && period)
		next = (floor_divide(s->checked_ns, period) + 1) * period;
	if (wanted & B_UPDATE)
		next = next < (second + 1) * SECOND_NS ? next : (second + 1) * SECOND_NS;
	if (wanted & B_ALARM) {
		int64_t alarm = next_alarm(s, second);
		if (alarm != INT64_MAX && alarm * SECOND_NS < next)
			next = alarm * SECOND_NS;
	}
	if (next != INT64_MAX && !(s->cmos[REG_C] & C_INTERRUPT)) {
		/* On the host's clock, which may be set: the timer follows it. A time that is past fires at once. */
		int64_t host = (int64_t)((uint64_t)next - (uint64_t)s->offset_ns);
		when.it_value.tv_sec = host > 0 ? host / SECOND_NS : 0;
		when.it_value.tv_nsec = host > 0 ? host % SECOND_NS : 1;
	}
	if (timerfd_settime(rtc->timer_fd, TFD_TIMER_ABSTIME, &when, NULL) < 0)
		log_error("rtc: timerfd_settime: errno %d", errno);
}

static void timer_fired(void *opaque, uint32_t events)
{
	struct rtc *rtc = opaque;
	uint64_t count;

	(void)events;
	if (read(rtc->timer_fd, &count, sizeof(count)) < 0)
		return; /* armed anew meanwhile */
	pthread_mutex_lock(&rtc->lock);
	check_events(rtc);
	arm_timer(rtc);
	pthread_mutex_unlock(&rtc->lock);
}

/* --- guest accesses, under lock --- */

static uint8_t read_register(struct rtc *rtc, unsigned reg)
{
	struct rtc_state *s = &rtc->state;
	bool running = !(s->cmos[REG_B] & B_SET);

	if (is_time_register(reg) && running)
		latch_time(rtc);
	if (reg == REG_A) {
		int64_t now = clock_ns(rtc), fraction = now - floor_divide(now, SECOND_NS) * SECOND_NS;
		return s->cmos[REG_A] | (running && fraction >= SECOND_NS - UPDATE_NS ? A_UPDATING : 0);
	}
	if (reg == REG_C) {
		check_events(rtc);
		uint8_t flags = s->cmos[REG_C];
		s->cmos[REG_C] = 0;
		update_line(rtc);
		arm_timer(rtc);
		return flags;
	}
	return s->cmos[reg];
}

static void write_control_b(struct rtc *rtc, uint8_t value)
{
	struct rtc_state *s = &rtc->state;
	uint8_t before = s->cmos[REG_B];

	if (!(before & B_SET))
		latch_time(rtc);
	s->cmos[REG_B] = value;
	/* The divider chain starts half a second before the first update (data sheet, "divider control"), and Linux
	 * counts on it. */
	if ((before & B_SET) && !(value & B_SET))
		set_time(rtc, SECOND_NS / 2);
	check_events(rtc);
	arm_timer(rtc);
}

static void write_register(struct rtc *rtc, unsigned reg, uint8_t value)
{
	struct rtc_state *s = &rtc->state;

	switch (reg) {
	case REG_A:
		check_events(rtc);
		s->cmos[REG_A] = value & A_KEPT;
		arm_timer(rtc);
		return;
	case REG_B:
		write_control_b(rtc, value);
		return;
	case REG_C:
	case REG_D:
		return;
	case REG_SECONDS_ALARM:
	case REG_MINUTES_ALARM:
	case REG_HOURS_ALARM:
		check_events(rtc);
		s->cmos[reg] = value;
		arm_timer(rtc);
		return;
	default:
		break;
	}
	if (is_time_register(reg) && !(s->cmos[REG_B] & B_SET)) {
		/* The weekday follows from the date. */
		int64_t now = clock_ns(rtc);
		latch_time(rtc);
		s->cmos[reg] = value;
		set_time(rtc, now - floor_divide(now, SECOND_NS) * SECOND_NS);
		arm_timer(rtc);
		return;
	}
	s->cmos[reg] = value;
}

static void read_ports(void *opaque, uint64_t offset, uint8_t *data, unsigned size)
{
	struct rtc *rtc = opaque;

	memset(data, 0xff, size); /* the index cannot be read back */
	pthread_mutex_lock(&rtc->lock);
	if (offset + size == PORTS)
		data[size - 1] = read_register(rtc, rtc->state.index);
	pthread_mutex_unlock(&rtc->lock);
}

static void write_ports(void *opaque, uint64_t offset, const uint8_t *data, unsigned size)
{
	struct rtc *rtc = opaque;

	pthread_mutex_lock(&rtc->lock);
	if (offset == 0)
		rtc->state.index = data[0] & INDEX_MASK;
	if (offset + size == PORTS)
		write_register(rtc, rtc->state.index, data[size - 1]);
	pthread_mutex_unlock(&rtc->lock);
}

/* --- life and state --- */

static const struct bus_ops rtc_ops = {.read = read_ports, .write = write_ports};

/* Where a PC's firmware leaves the size of memory. */
static void set_memory_size(uint8_t *cmos, uint64_t bytes)
{
	uint64_t low = min_u64(bytes, MEM_HOLE_START), above_1m_kib = min_u64((low >> 10) - 1024, UINT16_MAX);
	uint64_t above_16m = low > 16ull << 20 ? (low - (16ull << 20)) >> 16 : 0, above_4g = (bytes - low) >> 16;

	put_le16(cmos + 0x15, 640);
	put_le16(cmos + 0x17, (uint16_t)above_1m_kib);
	put_le16(cmos + 0x30, (uint16_t)above_1m_kib);
	put_le16(cmos + 0x34, (uint16_t)min_u64(above_16m, UINT16_MAX));
	cmos[0x5b] = (uint8_t)above_4g;
	cmos[0x5c] = (uint8_t)(above_4g >> 8);
	cmos[0x5d] = (uint8_t)(above_4g >> 16);
}

static int create_timer(struct rtc *rtc, struct err *err)
{
	rtc->timer_fd = timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC | TFD_NONBLOCK);
	if (rtc->timer_fd < 0)
		return err_sys(err, errno, "rtc: timerfd_create");
	return loop_add(rtc->loop, rtc->timer_fd, EPOLLIN, timer_fired, rtc, &rtc->source, err);
}

int rtc_create(const struct isa_platform *platform, const struct rtc_config *config, struct rtc **out, struct err *err)
{
	struct rtc *rtc = xcalloc(1, sizeof(*rtc));
	int r = 0;

	rtc->platform = *platform;
	rtc->loop = config->loop;
	rtc->timer_fd = -1;
	pthread_mutex_init(&rtc->lock, NULL);
	rtc->state.cmos[REG_A] = A_DIVIDER_RATE;
	rtc->state.cmos[REG_B] = B_24_HOURS;
	rtc->state.cmos[REG_D] = D_VALID;
	rtc->state.checked_ns = clock_ns(rtc);
	set_memory_size(rtc->state.cmos, config->memory_bytes);
	if (rtc->loop)
		r = create_timer(rtc, err);
	if (r == 0)
		r = bus_add(platform->pio, "rtc", RTC_PORT, PORTS, &rtc_ops, rtc, err);
	if (r < 0) {
		rtc_destroy(rtc);
		return r;
	}
	*out = rtc;
	return 0;
}

void rtc_destroy(struct rtc *rtc)
{
	if (!rtc)
		return;
	bus_remove(rtc->platform.pio, RTC_PORT, rtc);
	if (rtc->source)
		loop_remove(rtc->loop, rtc->source);
	if (rtc->timer_fd >= 0)
		close(rtc->timer_fd);
	pthread_mutex_destroy(&rtc->lock);
	free(rtc);
}

void rtc_set_back(struct rtc *rtc, uint64_t ns)
{
	pthread_mutex_lock(&rtc->lock);
	int64_t offset;

	/* A time that no clock shows is not taken. */
	if (!(rtc->state.cmos[REG_B] & B_SET) && ns <= TIME_LIMIT_NS && !__builtin_sub_overflow(rtc->state.offset_ns, (int64_t)ns, &offset) &&
	    offset >= -OFFSET_LIMIT_NS) {
		rtc->state.offset_ns = offset;
		rtc->state.checked_ns = clock_ns(rtc); /* nothing happened in the time that is not shown */
	}
	arm_timer(rtc);
	pthread_mutex_unlock(&rtc->lock);
}

static int capture(void *opaque, void *state, struct err *err)
{
	struct rtc *rtc = opaque;

	(void)err;
	pthread_mutex_lock(&rtc->lock);
	*(struct rtc_state *)state = rtc->state;
	pthread_mutex_unlock(&rtc->lock);
	return 0;
}

static int validate(void *opaque, const void *state, struct err *err)
{
	const struct rtc_state *s = state;

	(void)opaque;
	if (s->index > INDEX_MASK || s->offset_ns > TIME_LIMIT_NS || s->offset_ns < -OFFSET_LIMIT_NS ||
	    s->checked_ns > OFFSET_LIMIT_NS || s->checked_ns < -OFFSET_LIMIT_NS)
		return err_set(err, ERR_DAMAGED, EINVAL, "rtc: impossible time or index");
	return 0;
}

static int apply(void *opaque, const void *state, struct err *err)
{
	struct rtc *rtc = opaque;

	(void)err;
	pthread_mutex_lock(&rtc->lock);
	rtc->state = *(const struct rtc_state *)state;
	update_line(rtc);
	arm_timer(rtc);
	pthread_mutex_unlock(&rtc->lock);
	return 0;
}

struct component rtc_component(struct rtc *rtc)
{
	return (struct component){
		.id = "rtc",
		.version = 1,
		.table = &rtc_table,
		.opaque = rtc,
		.capture = capture,
		.validate = validate,
		.apply = apply,
	};
}
