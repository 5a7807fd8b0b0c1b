package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"conex/internal/linux/bpf"

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
	// Each of the two files is opened once, and takes a rule with each write.
	fds := map[string]int{}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, d := range v1Devices(rules) {
		path := filepath.Join(dir, d.file)
		fd, ok := fds[d.file]
		if !ok {
			var err error
			if fd, err = retry(func() (int, error) { return unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0) }); err != nil {
				return fmt.Errorf("device access %q: %w", d.value, &os.PathError{Op: "open", Path: path, Err: err})
			}
			fds[d.file] = fd
		}
		if _, err := retry(func() (int, error) { return unix.Write(fd, []byte(d.value)) }); err != nil {
			return fmt.Errorf("device access %q: %w", d.value, &os.PathError{Op: "write", Path: path, Err: err})
		}
	}
	return nil
}

// deviceProgram compiles rules to eBPF for BPF_PROG_TYPE_CGROUP_DEVICE. For each kind of access that is asked for, the last
// rule which speaks of the device decides; without one the answer is no. So the program walks the rules backwards with the set of
// accesses still undecided, and says yes when the set is empty.
func deviceProgram(rules []specs.LinuxDeviceCgroup) []bpf.Instruction {
	const (
		typ    = 2 // registers
		undec  = 3
		major  = 4
		minor  = 5
		result = 0
		ctx    = 1
	)
	// struct bpf_cgroup_dev_ctx: access_type (access in the upper half, type in the lower), major, minor.
	prog := []bpf.Instruction{
		bpf.Op(bpf.LoadWord, typ|ctx<<4, 0, 0),
		bpf.Op(bpf.MoveReg, undec|typ<<4, 0, 0),
		bpf.Op(bpf.And, typ, 0, 0xffff),
		bpf.Op(bpf.ShiftDown, undec, 0, 16),
		bpf.Op(bpf.LoadWord, major|ctx<<4, 4, 0),
		bpf.Op(bpf.LoadWord, minor|ctx<<4, 8, 0),
	}
	for i := len(rules) - 1; i >= 0; i-- {
		r := rules[i]
		var test []bpf.Instruction // jump to the next rule when this one doesn't speak of the device
		switch r.Type {
		case "b":
			test = append(test, bpf.Op(bpf.IfNot, typ, 0, typeBlock))
		case "c":
			test = append(test, bpf.Op(bpf.IfNot, typ, 0, typeChar))
		}
		if !every(r.Major) {
			test = append(test, bpf.Op(bpf.IfNot, major, 0, int32(*r.Major)))
		}
		if !every(r.Minor) {
			test = append(test, bpf.Op(bpf.IfNot, minor, 0, int32(*r.Minor)))
		}
		var act []bpf.Instruction
		if bits := int32(access(r)); r.Allow {
			act = []bpf.Instruction{bpf.Op(bpf.And, undec, 0, ^bits), bpf.Op(bpf.IfNot, undec, 2, 0), bpf.Op(bpf.Move, result, 0, 1), bpf.Op(bpf.Exit, 0, 0, 0)}
		} else {
			act = []bpf.Instruction{bpf.Op(bpf.MoveReg, result|undec<<4, 0, 0), bpf.Op(bpf.And, result, 0, bits), bpf.Op(bpf.IfEqual, result, 2, 0), bpf.Op(bpf.Move, result, 0, 0), bpf.Op(bpf.Exit, 0, 0, 0)}
		}
		for j := range test {
			test[j].Off = int16(len(test) - j - 1 + len(act))
		}
		prog = append(append(prog, test...), act...)
		if wide(r) {
			break // nothing before it can matter
		}
	}
	return append(prog, bpf.Op(bpf.Move, result, 0, 0), bpf.Op(bpf.Exit, 0, 0, 0))
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
	old, err := bpf.Attached(cg, unix.BPF_CGROUP_DEVICE)
	if err != nil {
		return fmt.Errorf("device access in %s: query BPF programs: %w", dir, err)
	}
	prog, err := bpf.Load(unix.BPF_PROG_TYPE_CGROUP_DEVICE, unix.BPF_CGROUP_DEVICE, "conex_devices", deviceProgram(rules))
	if err != nil {
		return fmt.Errorf("device access in %s: %w", dir, err)
	}
	defer unix.Close(prog)
	if err := bpf.Attach(cg, prog, unix.BPF_CGROUP_DEVICE); err != nil {
		return fmt.Errorf("device access in %s: attach BPF program: %w", dir, err)
	}
	for _, id := range old {
		if err := bpf.Detach(cg, id, unix.BPF_CGROUP_DEVICE); err != nil {
			return fmt.Errorf("device access in %s: detach the former BPF program: %w", dir, err)
		}
	}
	return nil
}
