/* Sleep between work: until the timer's next interrupt, 18 times a second. */
#include "cpu.h"
#include "tiny.h"

enum {
	PIC1_COMMAND = 0x20,
	PIC1_DATA = 0x21,
	PIC2_DATA = 0xa1,
	PIT_CHANNEL0 = 0x40,
	PIT_COMMAND = 0x43,
};

#define PIC_INIT	  0x11 /* edges, cascade, and a fourth word to come */
#define PIC_VECTOR	  0x20
#define PIC_SECOND_AT_2	  0x04
#define PIC_8086	  0x01
#define PIC_ALL		  0xff
#define PIC_ALL_BUT_TIMER 0xfe
#define PIT_MODE2_CH0	  0x34 /* channel 0, low then high byte, rate generator */
#define FAULT_VECTOR	  13

extern const char idle_fault[], idle_interrupt[];

void idle_start(void)
{
	exception_gate(FAULT_VECTOR, idle_fault);
	exception_gate(PIC_VECTOR, idle_interrupt);
	outb(PIC2_DATA, PIC_ALL);
	outb(PIC1_COMMAND, PIC_INIT);
	outb(PIC1_DATA, PIC_VECTOR);
	outb(PIC1_DATA, PIC_SECOND_AT_2);
	outb(PIC1_DATA, PIC_8086);
	outb(PIC1_DATA, PIC_ALL_BUT_TIMER);
	outb(PIT_COMMAND, PIT_MODE2_CH0);
	outb(PIT_CHANNEL0, 0); /* 65536 ticks, the most there are */
	outb(PIT_CHANNEL0, 0);
}

void idle_sleep(void) { __asm__ volatile("hlt" : : : "memory"); }
