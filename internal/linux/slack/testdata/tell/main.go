// Command tell prints the timer slack of its threads, of a program that it executes, and of its threads after Settle: a JSON list of each.
package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"

	"conex/internal/linux/slack"
)

// threads are the slacks of all threads of this process, each once.
func threads() []string {
	list, err := os.ReadDir("/proc/self/task")
	if err != nil {
		panic(err)
	}
	var all []string
	for _, t := range list {
		b, err := os.ReadFile("/proc/" + t.Name() + "/timerslack_ns")
		if err == nil { // it may have ended
			all = append(all, strings.TrimSpace(string(b)))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func main() {
	first := threads()
	var out []byte
	err := slack.Run(func() (err error) {
		out, err = exec.Command("cat", "/proc/self/timerslack_ns").Output()
		return err
	})
	if err != nil {
		panic(err)
	}
	// Threads: goroutines that are locked to theirs.
	var ready sync.WaitGroup
	end := make(chan struct{})
	for range 20 {
		ready.Go(func() {
			locked := make(chan struct{})
			go func() { // until the process ends
				runtime.LockOSThread()
				close(locked)
				<-end
			}()
			<-locked
		})
	}
	ready.Wait()
	slack.Settle()
	settled := threads()
	close(end)
	if err := json.NewEncoder(os.Stdout).Encode([][]string{first, {strings.TrimSpace(string(out))}, settled}); err != nil {
		panic(err)
	}
}
