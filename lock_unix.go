//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lock keeps other processes out until the file is closed or this process ends.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, lockError(err)
	}
	return f, nil
}

// lockError distinguishes a file that another process has locked from a file system
// that cannot lock files.
func lockError(err error) error {
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return errors.New("in use by another process; stop that process first")
	}
	return fmt.Errorf("the file system cannot lock files (%w); put this file on another one", err)
}
