// Package held keeps Go from initialising some linked-in libraries before main. Package ondemand does it when they are used.
//
// Go runs the initialisation of every package before main, in the order of imports and else of paths. This package imports nothing but
// unsafe, so that its turn comes before that of any other module's, and marks their records in the linker's list as done. A record that Go
// has come to before is left alone, and one that the linker did not find has no functions: both are like no record at all.
package held

import "unsafe"

// record is runtime.initTask (runtime/proc.go), the addresses of its functions follow it. The build constraint of records.go names the
// releases of Go in which it looks like this.
type record struct {
	state uint32 // 0 to be done, 1 being done, 2 done
	n     uint32
	first uintptr
}

const done = 2

// Package is one package whose initialisation waits.
type Package struct {
	Path   string
	record *record
	held   bool
}

// Library is packages in the order in which they are to be initialised.
type Library []Package

func init() {
	for _, l := range all {
		for i := range l {
			l[i].hold()
		}
	}
}

func (p *Package) hold() {
	if p.record.state == 0 && p.record.n > 0 {
		p.record.state, p.held = done, true
	}
}

// Held says whether the package was kept from being initialised before main.
func (p *Package) Held() bool { return p.held }

// Initialise does what Go would have done before main. It may be called once.
func (l Library) Initialise() {
	for _, p := range l {
		if !p.held {
			continue
		}
		for i := range uintptr(p.record.n) {
			// A function value is the address of where the function's address lies.
			at := unsafe.Add(unsafe.Pointer(&p.record.first), i*unsafe.Sizeof(uintptr(0)))
			(*(*func())(unsafe.Pointer(&at)))()
		}
	}
}
