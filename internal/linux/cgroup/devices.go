package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// restricts reports whether a list of device rules keeps anything away: a privileged container's list allows all, and then no
// cgroup is needed for it.
func restricts(rules []specs.LinuxDeviceCgroup) bool {
	if len(rules) == 0 {
		return false
	}
	last := rules[len(rules)-1]
	return !(last.Allow && wide(last))
}

// wide reports whether a rule speaks of every device and every kind of access.
func wide(r specs.LinuxDeviceCgroup) bool {
	return (r.Type == "" || r.Type == "a") && every(r.Major) && every(r.Minor) && access(r) == accessAll
}

// every reports whether a number stands for all.
func every(n *int64) bool { return n == nil || *n < 0 }

// The bits of BPF_DEVCG_ACC_* and BPF_DEVCG_DEV_*.
const (
	accessMknod = 1
	accessRead  = 2
	accessWrite = 4
	accessAll   = accessMknod | accessRead | accessWrite

	typeBlock = 1
	typeChar  = 2
)

// access returns a rule's letters as bits; no letters mean all.
func access(r specs.LinuxDeviceCgroup) int {
	bits := 0
	for _, c := range r.Access {
		switch c {
		case 'm':
			bits |= accessMknod
		case 'r':
			bits |= accessRead
		case 'w':
			bits |= accessWrite
		}
	}
	if r.Access == "" {
		return accessAll
	}
	return bits
}

// ParseDeviceRule reads a rule that allows devices in the kernel's own form, as in "c 13:* rwm".
func ParseDeviceRule(s string) (specs.LinuxDeviceCgroup, error) {
	r := specs.LinuxDeviceCgroup{Allow: true}
	bad := fmt.Errorf("device rule %q is not of the form \"c 13:64 rwm\"", s)
	kind, rest, _ := strings.Cut(s, " ")
	numbers, access, _ := strings.Cut(rest, " ")
	major, minor, ok := strings.Cut(numbers, ":")
	if !ok || kind != "a" && kind != "b" && kind != "c" || access == "" || len(access) > 3 {
		return r, bad
	}
	r.Type, r.Access = kind, access
	for _, n := range []struct {
		text string
		to   **int64
	}{{major, &r.Major}, {minor, &r.Minor}} {
		if n.text == "*" {
			continue
		}
		v, err := strconv.ParseUint(n.text, 10, 31)
		if err != nil {
			return r, bad
		}
		i := int64(v)
		*n.to = &i
	}
	if checkDevices([]specs.LinuxDeviceCgroup{r}) != nil {
		return r, bad
	}
	return r, nil
}

// checkDevices refuses rules that make no sense.
func checkDevices(rules []specs.LinuxDeviceCgroup) error {
	for _, r := range rules {
		switch r.Type {
		case "", "a", "b", "c":
		default:
			return fmt.Errorf("device rule: unknown type %q", r.Type)
		}
		if strings.Trim(r.Access, "rwm") != "" {
			return fmt.Errorf("device rule: unknown access %q", r.Access)
		}
		for _, n := range []*int64{r.Major, r.Minor} {
			if n != nil && *n > 1<<31-1 {
				return fmt.Errorf("device rule: device number %d is too large", *n)
			}
		}
	}
	return nil
}

// v1Device is one write to devices.allow or devices.deny.
type v1Device struct{ file, value string }

// v1Devices turns rules into v1's writes.
func v1Devices(rules []specs.LinuxDeviceCgroup) []v1Device {
	var out []v1Device
	for _, r := range rules {
		file := "devices.deny"
		if r.Allow {
			file = "devices.allow"
		}
		if wide(r) {
			out = append(out, v1Device{file, "a"})
			continue
		}
		types := []string{r.Type}
		if r.Type == "" || r.Type == "a" {
			// After an "a" the kernel reads no further, so what is meant for both kinds is written for each.
			types = []string{"b", "c"}
		}
		letters := r.Access
		if letters == "" {
			letters = "rwm"
		}
		for _, t := range types {
			out = append(out, v1Device{file, fmt.Sprintf("%s %s:%s %s", t, star(r.Major), star(r.Minor), letters)})
		}
	}
	return out
}

func star(n *int64) string {
	if every(n) {
		return "*"
	}
	return itoa(*n)
}

// writeV1Devices sets the rules in a folder of the devices controller.
func writeV1Devices(dir string, rules []specs.LinuxDeviceCgroup) error {
	if err := checkDevices(rules); err != nil {
		return err
	}
	for _, d := range v1Devices(rules) {
		if err := writeFile(filepath.Join(dir, d.file), d.value); err != nil {
			return fmt.Errorf("device access %q: %w", d.value, err)
		}
	}
	return nil
}

// insn is struct bpf_insn.
type insn struct {
	code uint8
	regs uint8 // destination, and source in the upper half
	off  int16
	imm  int32
}

// deviceProgram compiles rules to eBPF for BPF_PROG_TYPE_CGROUP_DEVICE. For each kind of access that is asked for, the last
// rule which speaks of the device decides; without one the answer is no. So the program walks the rules backwards with the set of
// accesses still undecided, and says yes when the set is empty.
func deviceProgram(rules []specs.LinuxDeviceCgroup) []insn {
	const (
		ldx    = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
		movX   = 0x07 | 0xb0 | unix.BPF_X // BPF_ALU64 | BPF_MOV
		movK   = 0x07 | 0xb0 | unix.BPF_K
		andK   = 0x07 | unix.BPF_AND | unix.BPF_K
		rshK   = 0x07 | unix.BPF_RSH | unix.BPF_K
		jneK   = unix.BPF_JMP | 0x50 | unix.BPF_K
		jeqK   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		exit   = unix.BPF_JMP | 0x90
		typ    = 2 // registers
		undec  = 3
		major  = 4
		minor  = 5
		result = 0
		ctx    = 1
	)
	// struct bpf_cgroup_dev_ctx: access_type (access in the upper half, type in the lower), major, minor.
	prog := []insn{
		{ldx, typ | ctx<<4, 0, 0},
		{movX, undec | typ<<4, 0, 0},
		{andK, typ, 0, 0xffff},
		{rshK, undec, 0, 16},
		{ldx, major | ctx<<4, 4, 0},
		{ldx, minor | ctx<<4, 8, 0},
	}
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		var test []insn // jump to the next rule when this one doesn't speak of the device
		switch r.Type {
		case "b":
			test = append(test, insn{jneK, typ, 0, typeBlock})
		case "c":
			test = append(test, insn{jneK, typ, 0, typeChar})
		}
		if !every(r.Major) {
			test = append(test, insn{jneK, major, 0, int32(*r.Major)})
		}
		if !every(r.Minor) {
			test = append(test, insn{jneK, minor, 0, int32(*r.Minor)})
		}
		var act []insn
		if bits := int32(access(r)); r.Allow {
			act = []insn{{andK, undec, 0, ^bits}, {jneK, undec, 2, 0}, {movK, result, 0, 1}, {exit, 0, 0, 0}}
		} else {
			act = []insn{{movX, result | undec<<4, 0, 0}, {andK, result, 0, bits}, {jeqK, result, 2, 0}, {movK, result, 0, 0}, {exit, 0, 0, 0}}
		}
		for j := range test {
			test[j].off = int16(len(test) - j - 1 + len(act))
		}
		prog = append(append(prog, test...), act...)
		if wide(r) {
			break // nothing before it can matter
		}
	}
	return append(prog, insn{movK, result, 0, 0}, insn{exit, 0, 0, 0})
}

// attachDevices puts the rules' program on a cgroup of a v2 tree, in place of those that it had. The new one is attached before the
// old ones go; since all must say yes, the time in between is stricter, never laxer.
func attachDevices(dir string, rules []specs.LinuxDeviceCgroup) error {
	if err := checkDevices(rules); err != nil {
		return err
	}
	cg, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(cg)
	old, err := devicePrograms(cg)
	if err != nil {
		return fmt.Errorf("device access in %s: query BPF programs: %w", dir, err)
	}
	prog, err := loadProgram(deviceProgram(rules))
	if err != nil {
		return fmt.Errorf("device access in %s: load BPF program: %w", dir, err)
	}
	defer unix.Close(prog)
	if err := attach(unix.BPF_PROG_ATTACH, cg, prog); err != nil {
		return fmt.Errorf("device access in %s: attach BPF program: %w", dir, err)
	}
	for _, id := range old {
		fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&struct{ id, next, flags uint32 }{id: id}), 12)
		if err == nil {
			err = attach(unix.BPF_PROG_DETACH, cg, fd)
			unix.Close(fd)
		}
		if err != nil && err != unix.ENOENT { // somebody else was faster
			return fmt.Errorf("device access in %s: detach the former BPF program: %w", dir, err)
		}
	}
	return nil
}

// The members of union bpf_attr for the commands, as linux/bpf.h lays them out for machines with 64-bit pointers.
type (
	attrLoad struct {
		progType, insnCount uint32
		insns, license      unsafe.Pointer
		logLevel, logSize   uint32
		logBuf              unsafe.Pointer
		kernVersion, flags  uint32
		name                [16]byte
	}
	attrAttach struct{ target, prog, attachType, flags uint32 }
	attrQuery  struct {
		target, attachType, queryFlags, attachFlags uint32
		ids                                         unsafe.Pointer
		count, _                                    uint32
	}
)

func loadProgram(prog []insn) (fd int, err error) {
	license := [...]byte{'A', 'p', 'a', 'c', 'h', 'e', 0}
	a := attrLoad{
		progType: unix.BPF_PROG_TYPE_CGROUP_DEVICE, insnCount: uint32(len(prog)), insns: unsafe.Pointer(&prog[0]), license: unsafe.Pointer(&license[0]),
	}
	copy(a.name[:], "conex_devices")
	return bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&a), unsafe.Sizeof(a))
}

func attach(cmd, cg, prog int) error {
	a := attrAttach{target: uint32(cg), prog: uint32(prog), attachType: unix.BPF_CGROUP_DEVICE}
	if cmd == unix.BPF_PROG_ATTACH {
		a.flags = unix.BPF_F_ALLOW_MULTI
	}
	_, err := bpf(cmd, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// devicePrograms lists the ids of the device programs that are attached to the cgroup itself.
func devicePrograms(cg int) ([]uint32, error) {
	var ids [64]uint32 // the kernel's limit for one cgroup
	a := attrQuery{target: uint32(cg), attachType: unix.BPF_CGROUP_DEVICE, ids: unsafe.Pointer(&ids[0]), count: uint32(len(ids))}
	_, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&a), unsafe.Sizeof(a))
	if err != nil {
		return nil, err
	}
	return ids[:a.count:a.count], nil
}

// bpf is bpf(2).
func bpf(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN: // the verifier gives way to signals
		default:
			return -1, errno
		}
	}
}
